"""Operators that a runtime lacks, written in others that every runtime has."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["expand_boolean_where"]


def expand_boolean_where(model: ir.Model) -> None:
    """Write `Where` of booleans (a mask filled into a mask) with `And`, `Or` and `Not`, in place.

    ONNX allows it; ONNX Runtime has no kernel for it on a CPU.
    """
    for node in list(model.graph):
        if node.op_type != "Where" or node.domain not in ("", "ai.onnx"):
            continue
        if node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        condition, first, second = node.inputs
        chosen = ir.node("And", [condition, first])
        negated = ir.node("Not", [condition])
        rest = ir.node("And", [negated.outputs[0], second])
        result = ir.node("Or", [chosen.outputs[0], rest.outputs[0]])
        old, new = node.outputs[0], result.outputs[0]
        for each in (chosen, negated, rest, result):
            each.outputs[0].dtype = ir.DataType.BOOL
        new.shape, new.name = old.shape, old.name
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [chosen, negated, rest, result], [old], [new]
        )
