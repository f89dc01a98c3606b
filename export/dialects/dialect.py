"""What a dialect is: the operators and types that one family of runtimes accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

__all__ = ["Dialect", "Translation"]

# Called with symbolic ONNX values; records nodes and returns their result. Typed `Any`, since the
# exporter reads the annotations of these functions to tell inputs from attributes.
Translation = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How torch operators are written for one family of runtimes.

    Attributes:
        name: as in `export_onnx(dialect=...)`.
        opset: version of the default ONNX domain.
        newer_opsets: the same for a graph with a `vcompress` operator whose name begins so.
        refused: format of a frozen layer that the runtimes cannot take -> why.
        translations: torch operator -> function that records its ONNX nodes.
        finish: changes the translated graph in place, before it is optimized.
    """

    name: str
    opset: int
    newer_opsets: Mapping[str, int]
    refused: Mapping[str, str]
    translations: Mapping[Callable[..., Any], Translation]
    finish: Callable[[ir.Model], None]
