"""What TensorRT says when it cannot build, turned into node, constraint and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vcompress.spec.errors import BuildError

__all__ = ["build_error"]

# Names the real complaint: "Error Code 4: API Usage Error (<complaint> In validate at /_src/...)".
_COMPLAINT = re.compile(r"Error Code \d+: [\w ]+ \((?P<text>.*?)\s*(?:\. )?In \w+ at /", re.DOTALL)
_CONDITION = re.compile(r"Assertion failed: .*?: |^\w+ && (?=\")")
_NO_GPU = "cudaError 35"  # comes with every error on a machine without a driver

_REMEDIES = (
    (
        r"HW-specific datatypes: fp4",
        "FP4 needs a Blackwell GPU (SM 120, 121): choose such an SM, or the target fp8 or int8",
    ),
    (
        r"HW-specific datatypes: fp8",
        "FP8 needs an Ada or newer GPU (SM 89 and up): choose such an SM, or the target int8",
    ),
    (
        r"Unsupported reduction type",
        "write the sum as a one-hot matrix product: this runtime scatters without reduction only",
    ),
    (
        r"NonZero",
        "data-dependent shapes cannot be built: fix the number of tokens and select with TopK",
    ),
    (r"K exceeds the maximum|TopK", "TopK needs a constant K of at most 3840"),
    (
        r"[Nn]on-zero zero point|DynamicQuantizeLinear",
        "quantize symmetrically with zero points of 0: the dialect tensorrt does so",
    ),
    (
        r"Attention",
        "export with opset 22 or lower, so that attention is written in plain operators",
    ),
    (
        r"Plugin not found|plugin creator",
        "the operator is not one of this runtime: export the model with the dialect tensorrt",
    ),
)  # fmt: skip
_DEFAULT_REMEDY = "the ONNX model itself can still be run with ONNX Runtime"
_CRASH_REMEDY = (
    "this is a fault of the builder: where the model has ONNX Attention operators, export with "
    "opset 22 or lower; else give the layers at fault the format keep"
)


def build_error(
    what: str, event: Mapping[str, Any], *, ended: str, node: str, output: str
) -> BuildError:
    """The error for a build that did not succeed.

    Args:
        what: library, version, compute capability and model.
        event: the last event of the worker.
        ended: how its process ended, in words.
        node: the node that was being parsed when it ended, in words.
        output: what it wrote to standard error.
    """
    if event["event"] == "failed":
        complaints = _parse_complaints(event["errors"]) or _log_complaints(event["messages"])
        stage = {"parse": "cannot parse the graph", "build": "cannot build the engine"}
        head = f"{what}: {stage[event['stage']]}"
    else:
        detail = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        return BuildError(
            f"{what}: the builder ended with {ended}, node being parsed: {node or 'none yet'}"
            f"{'; ' + detail.strip() if detail else ''}; {_CRASH_REMEDY}"
        )
    lines = [f"{text}; {_remedy(text)}" for text in complaints]
    if len(lines) == 1:
        return BuildError(f"{head}: {lines[0]}")
    return BuildError("\n  ".join([f"{head}:", *lines]))


def _parse_complaints(errors: Iterable[Mapping[str, str]]) -> list[str]:
    complaints: dict[str, None] = {}
    for error in errors:
        text = _readable(error["text"], error["operator"])
        place = f"node {error['name']} ({error['operator']})" if error["operator"] else "the file"
        complaints[f"{place}: {text}"] = None
    return list(complaints)


def _log_complaints(messages: Iterable[str]) -> list[str]:
    """The errors of the builder's log; they name nodes in their own words."""
    errors = [message for message in messages if not message.startswith("WARNING")]
    return list(dict.fromkeys(_readable(text, "") for text in errors if _NO_GPU not in text)) or [
        "it gave no reason"
    ]


def _readable(text: str, operator: str) -> str:
    """One line that says what is wrong, without source files and without the missing driver."""
    lines = [line for line in text.splitlines() if _NO_GPU not in line]
    joined = " ".join(lines)
    if match := _COMPLAINT.search(joined):
        joined = match["text"]
    joined = re.sub(r"^\[\w+\.cpp[^\]]*\] ", "", joined)
    joined = _CONDITION.sub("", re.sub(r"^(?:INTERNAL_)?ERROR: ", "", joined)).strip(' ."')
    # Some checks fail with the bare C++ condition.
    return f"{operator} is not supported" if joined in ("false", "") else joined


def _remedy(complaint: str) -> str:
    return next(
        (remedy for pattern, remedy in _REMEDIES if re.search(pattern, complaint)), _DEFAULT_REMEDY
    )
