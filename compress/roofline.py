"""Times of a GPU that is not here, estimated from its data sheet.

What: the roofline model (Williams et al., 2009, https://doi.org/10.1145/1498765.1498785). An
operation takes the longer of two times: its multiplications at the peak rate of its format, and
its bytes at the bandwidth of the memory. No kernel reaches either, small ones stay far below, and
launches cost nothing here: the estimate ranks formats, it predicts no latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vcompress.compress.latency_table import LatencyEntry, LatencyTable, operation_sizes
from vcompress.spec.attention_section import PRODUCT_BITS, PRODUCT_FORMATS
from vcompress.spec.formats import FLOAT, FORMATS

__all__ = ["RTX_5090", "Device", "estimate"]

_FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as its data sheet has it.

    Attributes:
        name: for people.
        operations_per_second: dense peak with the precise accumulator, by format; a
            multiplication and an addition are two operations.
        bytes_per_second: of the memory.
    """

    name: str
    operations_per_second: Mapping[str, float]
    bytes_per_second: float


# NVIDIA, "NVIDIA RTX Blackwell GPU Architecture" (whitepaper, 2025), appendix A, GeForce RTX 5090.
# What is advertised, 3352 TOPS for FP4, is with sparsity and twice as much; FP8 with an accumulator
# of 16 bits runs twice as fast as with 32 bits, which is what is meant here. Float is TF32, and
# weights of four bits with float inputs are computed in it too.
RTX_5090 = Device(
    name="NVIDIA GeForce RTX 5090 (SM120)",
    operations_per_second={
        "nvfp4": 1676e12, "mxfp4": 1676e12, "mxfp8": 419e12, "fp8": 419e12, "fp8_channel": 419e12,
        "int8": 838e12, "int8_token": 838e12, FLOAT: 104.8e12,
        **{name: 104.8e12 for name in FORMATS if FORMATS[name].input_bits == 0},
    },
    bytes_per_second=1792e9,
)  # fmt: skip


def estimate(
    operations: Iterable[str], formats: Iterable[str], device: Device = RTX_5090
) -> LatencyTable:
    """A table for all of `operations` in all of `formats` that they can take, and in float."""
    wanted = tuple(dict.fromkeys((FLOAT, *formats)))
    entries = []
    for operation in dict.fromkeys(operations):
        for format_name in wanted:
            seconds = _seconds(operation, format_name, device)
            if seconds is not None:
                entries.append(
                    LatencyEntry(operation=operation, format=format_name, seconds=seconds)
                )
    return LatencyTable(
        source="estimate", runtime="roofline of the data sheet", device=device.name,
        model_seconds=None, entries=tuple(entries),
    )  # fmt: skip


def _seconds(operation: str, format_name: str, device: Device) -> float | None:
    """The longer of the time to compute and the time to move."""
    kind, shapes = operation_sizes(operation)
    if kind == "attention":
        if format_name != FLOAT and format_name not in PRODUCT_FORMATS:
            return None
        both = [device.operations_per_second[each]
                for each in PRODUCT_FORMATS.get(format_name, (FLOAT, FLOAT))]  # fmt: skip
        rate = 2 / (1 / both[0] + 1 / both[1])
        count, values, written = _of_attention(*shapes[0])
        widths = [_FLOAT_BITS if each == FLOAT else PRODUCT_BITS
                  for each in PRODUCT_FORMATS.get(format_name, (FLOAT, FLOAT))]  # fmt: skip
        moved = sum(widths) / 2 * values + _FLOAT_BITS * written
        return max(count / rate, moved / 8 / device.bytes_per_second)
    if format_name not in FORMATS and format_name != FLOAT:
        # Of products of attention alone.
        return None
    rate = device.operations_per_second[format_name]
    if kind == "linear":
        rows, inputs, outputs = shapes[0]
        weight: tuple[int, ...] = (outputs, inputs)
        read, written = rows * inputs, rows * outputs
        count = 2.0 * rows * inputs * outputs
    else:
        image, weight = shapes
        read = math.prod(image)
        # Without stride and padding, whose places are about as many as those of the input.
        places = math.prod(image[2:])
        stride = operation.split("/")[1].split("x")
        places = max(1, places // math.prod(int(step) for step in stride))
        written = image[0] * weight[0] * places
        count = 2.0 * image[0] * math.prod(weight) * places
    if format_name == FLOAT:
        bits = float(_FLOAT_BITS * (math.prod(weight) + read + written))
    else:
        chosen = FORMATS[format_name]
        if chosen.objection(kind, weight) is not None:
            return None
        bits = chosen.weight_bits(weight) + (chosen.input_bits or _FLOAT_BITS) * read
        bits += _FLOAT_BITS * written
    return max(count / rate, bits / 8 / device.bytes_per_second)


def _of_attention(
    rows: int, queries: int, keys: int, width: int, value_width: int
) -> tuple[float, int, int]:
    """Operations, values that are read and values that are written; scores stay on the chip."""
    count = 2.0 * rows * queries * keys * (width + value_width)
    return count, rows * (queries * width + keys * (width + value_width)), rows * queries * width
