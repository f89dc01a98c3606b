"""The number formats against other implementations: are they equal, and how fast is packing.

    python benchmarks/formats.py [equality] [elements] [speed]

`equality`: codes and scales of stored weights, bit for bit, with numpy and ml_dtypes, modelopt and
torchao (where installed: `pip install torchao`), on about `--values` values for each pair and on
edge cases. A difference is explained if single steps, named in `because`, turn our result into
theirs bit for bit. `elements`: rounding of inputs with ml_dtypes. `speed`: packing a bfloat16
weight to NVFP4, called in turn with the others. `benchmarks/results/formats.json` keeps the last
run of each part and `--table` prints it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from vcompress.benchmarks.format_references import (
    FORMATS,
    Reference,
    nvfp4_packers,
    ours,
    references,
)
from vcompress.benchmarks.format_stored import Stored
from vcompress.benchmarks.format_values import NUM_CHANNELS, drawn, edges, trained
from vcompress.compress.numerics import e2m1, fp8, int8
from vcompress.spec.errors import InputError
from vcompress.validate.latency import describe_device, measure_interleaved

RESULTS = Path(__file__).parent / "results" / "formats.json"
PARTS = ("equality", "elements", "speed")
SHAPES = ((4096, 4096), (1536, 8960))
PEER = "modelopt NVFP4QTensor"
Sets = dict[str, list[torch.Tensor]]


def value_sets(num_values: int) -> Sets:
    """The weights to compare on: `num_values`, half of them float32, half bfloat16, and trained."""
    num_rows = max(1, round(num_values / 6 / NUM_CHANNELS))
    weights = [weight for _, weight in drawn(num_rows)]
    return {
        "drawn, float32": weights,
        "drawn, bfloat16": [weight.bfloat16() for weight in weights],
        "trained, float32": [trained()],
        "trained, bfloat16": [trained().bfloat16()],
    }


def different(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where the bits of float32 tensors differ; NaN is like NaN."""
    bits = one.contiguous().view(torch.int32) != other.contiguous().view(torch.int32)
    return bits & ~(one.isnan() & other.isnan())


def num_unexplained(theirs: Stored, variant: Stored) -> int:
    """Codes and scales in which the variant is not the reference."""
    pairs = [(getattr(theirs, name), getattr(variant, name)) for name in vars(theirs)]
    return sum(int(different(one, other).sum()) for one, other in pairs)


def compare(weight: torch.Tensor, mine: Stored, reference: Reference) -> dict[str, Any]:
    """Count what differs on one weight, by codes and by scales."""
    theirs = reference.quantize(weight)
    codes = different(mine.elements, theirs.elements)
    zeros = codes & (mine.elements == 0) & (theirs.elements == 0)
    codes &= ~zeros
    scales = int(different(mine.scales, theirs.scales).sum())
    tensor_scales = int(different(mine.tensor_scale, theirs.tensor_scale).sum())
    values = weight.double()
    error, error_theirs = (stored.values().sub_(values) for stored in (mine, theirs))
    size = values.norm()
    row: dict[str, Any] = {
        "num_values": weight.numel(),
        "num_codes_different": int(codes.sum()),
        "num_zeros_of_other_sign": int(zeros.sum()),
        "num_scales": mine.scales.numel(),
        "num_scales_different": scales,
        "num_tensor_scales_different": tensor_scales,
        "num_unexplained": 0,
        "num_nearer": int((error.abs() < error_theirs.abs())[codes].sum()),
        "num_farther": int((error.abs() > error_theirs.abs())[codes].sum()),
        "relative_errors": [number((error.norm() / size).item())],
        "relative_errors_of_reference": [number((error_theirs.norm() / size).item())],
    }
    if bool((codes | zeros).any()) or scales or tensor_scales:
        explained = None if reference.variant is None else reference.variant(weight)
        row["num_unexplained"] = (
            int((codes | zeros).sum()) + scales + tensor_scales
            if explained is None
            else num_unexplained(theirs, explained)
        )
    if bool(codes.any()):
        row["example"] = example(weight, mine, theirs, codes)
    return row


def number(value: float) -> float | str:
    """JSON has neither NaN nor infinities."""
    return value if math.isfinite(value) else str(value)


def example(
    weight: torch.Tensor, mine: Stored, theirs: Stored, where: torch.Tensor
) -> dict[str, Any]:
    """The first value whose code differs, with all that decides about it."""
    index = tuple(where.nonzero()[0].tolist())

    def one(stored: Stored) -> dict[str, float | str]:
        return {
            "element": number(stored.elements[index].item()),
            "scale": number(stored.spread_scales()[index].item()),
            "tensor_scale": number(stored.tensor_scale.item()),
        }

    return {"value": weight[index].item(), "vcompress": one(mine), "reference": one(theirs)}


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the counts of several weights, keep the first example."""
    merged: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            if key == "example":
                merged.setdefault(key, value)
            else:
                merged[key] = merged[key] + value if key in merged else value
    return merged


def is_equal(row: dict[str, Any]) -> bool:
    """Whether no code and no scale differs."""
    return not any(value for key, value in row.items() if key.endswith(("_different", "_sign")))


def compare_sets(format: str, reference: Reference, sets: Sets) -> Iterator[dict[str, Any]]:
    """One row for each set; bfloat16 once more as float32 where there is a difference."""
    quantize = ours(format)
    for name, weights in sets.items():
        row = total([compare(weight, quantize(weight), reference) for weight in weights])
        yield {"weights": name, **row}
        if name.endswith("bfloat16") and not is_equal(row):
            wide = [weight.float() for weight in weights]
            row = total([compare(weight, quantize(weight), reference) for weight in wide])
            yield {"weights": f"{name} given as float32", **row}


def compare_edges(format: str, reference: Reference) -> dict[str, Any]:
    """The edge cases: names of equal and of refused ones, counts of the others."""
    equal, refused, others = [], [], {}
    for name, weight in edges(format).items():
        try:
            mine = ours(format)(weight)
        except InputError:
            refused.append(name)
            continue
        row = compare(weight, mine, reference)
        if is_equal(row):
            equal.append(name)
        else:
            others[name] = {
                key: value
                for key, value in row.items()
                if (value and not key.startswith("relative")) or key == "num_unexplained"
            }
    return {"equal": equal, "refused_by_vcompress": refused, "different": others}


def measure_equality(num_values: int) -> list[dict[str, Any]]:
    """Compare every format with every reference."""
    sets = value_sets(num_values)
    rows = []
    for format in FORMATS:
        for reference in references(format):
            row: dict[str, Any] = {
                "format": format,
                "reference": reference.name,
                "because": reference.because,
                "sets": list(compare_sets(format, reference, sets)),
                "edges": compare_edges(format, reference),
            }
            counted = [*row["sets"], *row["edges"]["different"].values()]
            row["num_unexplained"] = sum(one["num_unexplained"] for one in counted)
            rows.append(row)
            print(f"{format}, {reference.name}: {row['num_unexplained']} unexplained", flush=True)
    return rows


def measure_elements(num_values: int) -> list[dict[str, Any]]:
    """Rounding of inputs with scale 1: every bfloat16, NaN and infinities too, and some float32."""
    generator = np.random.default_rng(0)
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    bits = generator.integers((127 - 14) << 23, (127 + 11) << 23, num_values, dtype=np.int32)
    drawn = bits.view(np.float32) * generator.choice(np.array([-1, 1], np.float32), num_values)
    one = torch.tensor(1.0)
    rows = []
    for name, x in (("every bfloat16", every), ("float32, 2^-14 to 2^11", drawn)):
        given = torch.from_numpy(x)
        four = x.clip(-6, 6)
        # ml_dtypes has no NaN of four bits, where it stays NaN here; numpy warns of any NaN.
        with np.errstate(invalid="ignore"):
            four = np.where(np.isnan(x), x, four.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
            eight = x.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            integers = np.rint(x).clip(-128, 127)
        pairs = {
            "E4M3": (fp8.quantize_dequantize(given, one), eight),
            "E2M1": (e2m1.round_(given.clone()), four),
            "INT8": (int8.quantize_dequantize(given, one, 0), integers),
        }
        for element, (rounded, expected) in pairs.items():
            same = np.isclose(rounded.numpy(), expected, 0, 0, equal_nan=True)
            row = {"element": element, "values": name, "num_values": len(x)}
            rows.append({**row, "num_different": int((~same).sum())})
    return rows


def measure_speed(rounds: int, threads: int) -> list[dict[str, Any]]:
    """Time the packing of a bfloat16 weight to NVFP4, all libraries in turn."""
    torch.set_num_threads(threads)
    peer = next(reference for reference in references("nvfp4") if reference.name == PEER)
    rows = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        assert is_equal(compare(weight, ours("nvfp4")(weight), peer))
        runners = {name: partial(pack, weight) for name, pack in nvfp4_packers().items()}
        statistics = measure_interleaved(runners, warm_up=2, rounds=rounds)
        rows.append(
            {
                "shape": list(shape),
                "device": describe_device(threads),
                "runners": {name: one.as_dict() for name, one in statistics.items()},
            }
        )
    return rows


def versions() -> dict[str, str]:
    """The libraries that were compared, as installed."""
    names = ("torch", "numpy", "ml_dtypes", "nvidia-modelopt", "torchao")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = []
    if "equality" in results:
        lines += [
            "| format | reference | weights | values | codes different (ours nearer, farther) | "
            "scales different | unexplained |",
            "|---|---|---|---|---|---|---|",
        ]
    for pair in results.get("equality", {}).get("rows", []):
        for row in pair["sets"]:
            lines.append(
                f"| {pair['format']} | {pair['reference']} | {row['weights']} | "
                f"{row['num_values']:,} | {row['num_codes_different']:,} "
                f"({row['num_nearer']:,}, {row['num_farther']:,}) | "
                f"{row['num_scales_different']:,} of {row['num_scales']:,} | "
                f"{row['num_unexplained']:,} |"
            )
    for row in results.get("elements", {}).get("rows", []):
        lines.append(
            f"{row['element']}, {row['values']}: {row['num_different']:,} of "
            f"{row['num_values']:,} differ from ml_dtypes"
        )
    for row in results.get("speed", {}).get("rows", []):
        shape = " x ".join(map(str, row["shape"]))
        for name, timed in row["runners"].items():
            line = f"packing {shape}, {name}: {timed['p50_ms']:.1f} ms"
            if (speed := timed["speed"]) is not None:
                ends = [speed["speed_ratio_lower"], speed["speed_ratio_upper"]]
                interval = " to ".join("?" if end is None else f"{end:.2f}" for end in ends)
                line += f", {speed['speed_ratio']:.2f} times as fast as {PEER} ({interval})"
            lines.append(f"{line}; {row['device']['num_threads']} threads")
    return "\n".join(lines)


def main() -> None:
    """Measure the parts that were asked for, keep the others, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--values", type=int, default=10**7, help="values for each pair")
    parser.add_argument("--rounds", type=int, default=20, help="of two timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measure = {
        "equality": lambda: measure_equality(arguments.values),
        "elements": lambda: measure_elements(arguments.values),
        "speed": lambda: measure_speed(arguments.rounds, arguments.threads),
    }
    for part in () if arguments.table else PARTS:
        if part in (arguments.parts or list(PARTS)):
            results[part] = {"versions": versions(), "rows": measure[part]()}
            RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
