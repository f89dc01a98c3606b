"""What each kind of operator takes in a graph as ONNX Runtime executes it.

ONNX Runtime's own profiler times every kernel of the graph that it optimized for itself, so fused
and integer kernels appear as what they are. A product whose second operand is one matrix is a
linear layer; between two stacks of matrices it belongs to an attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcompress.export.runtime import Array, Session

__all__ = ["GRAPH_CLASSES", "class_of_node", "graph_times"]

GRAPH_CLASSES = (
    "convolution", "linear", "attention", "normalisation", "rounding", "rest", "between operators",
)  # fmt: skip
_CLASS_OF = {
    **dict.fromkeys(("Softmax", "QLinearSoftmax", "Attention", "MultiHeadAttention"), "attention"),
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "rounding"
    ),
}  # fmt: skip


def class_of_node(operator: str, shapes: Sequence[Sequence[int]]) -> str:
    """One of `GRAPH_CLASSES` for a kernel.

    Args:
        operator: its type, as ONNX Runtime names it.
        shapes: of its operands.
    """
    if operator in _CLASS_OF:
        return _CLASS_OF[operator]
    if "Conv" in operator:
        return "convolution"
    if "Norm" in operator:
        return "normalisation"
    if "MatMul" in operator or "Gemm" in operator:
        matrices = [shape for shape in shapes if len(shape) > 1]
        between = len(matrices) > 1 and all(len(shape) > 2 for shape in matrices[:2])
        return "attention" if between else "linear"
    return "rest"


def graph_times(session: Session, inputs: Mapping[str, Array], *, calls: int) -> dict[str, float]:
    """Seconds of one call by `GRAPH_CLASSES`, of the least disturbed of `calls` calls.

    They add up to the call as the profiler saw it.
    """
    events = session.profile(inputs, calls=calls)
    best = min(
        (event for event in events if event["name"] == "model_run"),
        key=lambda event: int(event["dur"]),
    )
    found = dict.fromkeys(GRAPH_CLASSES, 0.0)
    for event in events:
        is_kernel = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and best["ts"] <= event["ts"] <= best["ts"] + best["dur"]:
            arguments = event["args"]
            shapes = [
                shape for each in arguments.get("input_type_shape", ()) for shape in each.values()
            ]
            found[class_of_node(arguments["op_name"], shapes)] += event["dur"] / 1e6
    found["between operators"] = max(0.0, best["dur"] / 1e6 - sum(found.values()))
    return found
