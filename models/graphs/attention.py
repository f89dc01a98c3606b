"""Attention that an ONNX file spells out, put back as the one function of torch that it was.

    softmax(Q' K'^T * c + mask) V   with Q' = Q * a, K' = K * b

becomes `scaled_dot_product_attention(Q, K, V, mask, scale=a b c)`, which `--attention` finds, and
which is exported as that of a module is. Forms with anything else in between stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional

from vcompress.models.graphs.operators import compute

if TYPE_CHECKING:
    from vcompress.models.graphs.blocks import Shapes

__all__ = ["with_attention"]

_RANKS = (3, 4)


def with_attention(module: fx.GraphModule, shapes: Shapes) -> int:
    """Replace every attention of `module` in place; returns how many there are."""
    found = 0
    for node in list(module.graph.nodes):
        if _is(node, "Softmax") and _replaced(module.graph, node, shapes):
            found += 1
    if found:
        module.graph.eliminate_dead_code()
        module.recompile()
    return found


def _is(node: Any, op_type: str) -> bool:
    return isinstance(node, fx.Node) and node.target is compute and node.args[0] == op_type


def _replaced(graph: fx.Graph, softmax: fx.Node, shapes: Shapes) -> bool:
    shape = shapes.get(softmax)
    weights = _guarded(softmax)
    users = list(weights.users)
    if shape is None or len(shape) not in _RANKS or len(users) != 1:
        return False
    if softmax.kwargs.get("axis", -1) not in (-1, len(shape) - 1):
        return False
    (product,) = users
    scores, mask = _without_mask(softmax.args[1], shapes)
    scores, factor = _without_factor(scores)
    if not _is(product, "MatMul") or product.args[1] is not weights or not _is(scores, "MatMul"):
        return False
    query, query_factor = _without_factor(scores.args[1])
    key, key_factor = _without_factor(scores.args[2])
    value = product.args[2]
    for operand in (query, key, value):
        if not isinstance(operand, fx.Node) or len(shapes.get(operand) or ()) != len(shape):
            return False
    with graph.inserting_before(product):
        turned = graph.call_function(torch.transpose, (key, -2, -1))
        attention = graph.call_function(
            functional.scaled_dot_product_attention, (query, turned, value),
            {"attn_mask": mask, "scale": factor * query_factor * key_factor},
        )  # fmt: skip
    attention.meta = dict(product.meta)
    product.replace_all_uses_with(attention)
    return True


def _guarded(softmax: fx.Node) -> fx.Node:
    """The node that writes 0 where all of a row is masked, as the function of torch does, too."""
    tests = [user for user in softmax.users if _is(user, "IsNaN")]
    if len(softmax.users) != 2 or len(tests) != 1 or len(tests[0].users) != 1:
        return softmax
    (guard,) = tests[0].users
    if _is(guard, "Where") and guard.args[1:] == (tests[0], 0.0, softmax):
        return guard
    return softmax


def _without_mask(scores: Any, shapes: Mapping[fx.Node, Any]) -> tuple[Any, fx.Node | None]:
    """The scores before a mask was added, and the mask."""
    if not _is(scores, "Add"):
        return scores, None
    left, right = scores.args[1:]
    if not all(isinstance(one, fx.Node) and shapes.get(one) for one in (left, right)):
        return scores, None
    if _is(_without_factor(right)[0], "MatMul"):
        left, right = right, left
    return left, right


def _without_factor(node: Any) -> tuple[Any, float]:
    """The node before it was multiplied by, or divided by, a number; and the factor."""
    if _is(node, "Mul") and isinstance(node.args[1], float):
        return node.args[2], node.args[1]
    if _is(node, "Mul") and isinstance(node.args[2], float):
        return node.args[1], node.args[2]
    if _is(node, "Div") and isinstance(node.args[2], float):
        return node.args[1], 1 / node.args[2]
    return node, 1.0
