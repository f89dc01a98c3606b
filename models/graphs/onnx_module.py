"""From an ONNX graph to a torch module with real linears and convolutions.

Products with a constant become `nn.Linear`, convolutions `nn.Conv3d` and its kin, at the full names
that the file still tells: of the weight, of the module that an exporter of torch noted, of the
bias, or of the node. Everything else is a call of `operators.compute`. What depends on constants
alone is computed here, once.

Shapes: x `[..., K]`, weights of MatMul `[K, N]`, of Gemm `[K, N]` or `[N, K]`.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional

from vcompress.models.graphs.constants import (
    Constant,
    attribute,
    geometry,
    identity,
    is_bias,
    plain,
    tensor_of,
)
from vcompress.models.graphs.layers import convolution, linear
from vcompress.models.graphs.onnx_file import OnnxFile
from vcompress.models.graphs.operators import OPERATORS, compute
from vcompress.models.graphs.rearrange import padded
from vcompress.models.graphs.tree import (
    free_name,
    place_module,
    place_tensor,
    tidy_name,
)
from vcompress.spec.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["VALUE", "translate"]

# In `node.meta`: the value of the ONNX graph that a node computes.
VALUE = "onnx_value"
_NO_INTERNAL_NAME = ("onnx::", "val_", "_val", "t_", "const")
# Operators behind which a constant is still the same weight.
_VIEWS = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
_MULTIPLE = ("Split", "TopK")


def translate(file: OnnxFile) -> fx.GraphModule:
    """The module of `file`, from its input to its first output."""
    return _Translator(file).run()


class _Translator:
    def __init__(self, file: OnnxFile) -> None:
        self.file, self.onnx = file, file.model.graph
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[str, fx.Node | Constant] = {}
        self.layers: dict[tuple[Any, ...], str] = {}
        self.placed: dict[int, str] = {}
        self.pending: list[tuple[fx.Node, Constant]] = []
        self.kept: list[torch.Tensor] = []  # an address is not used again while its tensor lives
        self.done: set[int] = set()  # additions that went into a layer as its bias
        self.prefix = "model." if file.own else ""

    def run(self) -> fx.GraphModule:
        for name, value in self.onnx.initializers.items():
            if value.const_value is None:
                message = f"{self.file.path}: {name} has no data"
                raise InputError(message)
            self.values[name] = Constant(plain(tensor_of(value.const_value)), name)
        clips = self.graph.placeholder("clips")
        self.values[self.file.input_name] = clips
        for node in self.onnx:
            if id(node) not in self.done:
                self._add(node)
        output = self.values[str(self.onnx.outputs[0].name)]
        if isinstance(output, Constant):
            message = f"{self.file.path}: the output does not depend on the input"
            raise InputError(message)
        self.graph.output(output)
        for read, constant in self.pending:
            read.target = self._placed(constant)
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        module.delete_all_unused_submodules()
        return module

    # What a node becomes.

    def _add(self, node: ir.Node) -> None:
        inputs = [None if one is None else self.values[str(one.name)] for one in node.inputs]
        attributes = {name: attribute(one) for name, one in node.attributes.items()}
        if node.op_type == "Constant":
            (value,) = attributes.values()
            self._set(node, Constant(plain(value)))
            return
        if all(one is None or isinstance(one, Constant) for one in inputs):
            self._fold(node, inputs, attributes)
        elif not self._add_layer(node, inputs, attributes):
            self._call(node, inputs, attributes)

    def _set(self, node: ir.Node, value: fx.Node | Constant, output: int = 0) -> None:
        name = str(node.outputs[output].name)
        if isinstance(value, fx.Node):
            value.meta[VALUE] = name
        self.values[name] = value

    def _fold(self, node: ir.Node, inputs: list[Any], attributes: dict[str, Any]) -> None:
        if node.op_type not in OPERATORS:
            message = f"{self._where(node)}: {node.op_type} of constants"
            raise InputError(message)
        values = [None if one is None else one.value for one in inputs]
        try:
            result = compute(node.op_type, *values, **self._arguments(node, attributes))
        except Exception as error:
            raise self._failed(node, error) from error
        name = inputs[0].name if node.op_type in _VIEWS and inputs else ""
        results = result if node.op_type in _MULTIPLE else (result,)
        for place, one in enumerate(results):
            self._set(node, Constant(plain(one), name), place)

    def _call(self, node: ir.Node, inputs: list[Any], attributes: dict[str, Any]) -> None:
        if node.op_type not in OPERATORS:
            message = (
                f"{self._where(node)}: {node.op_type} with a weight that is computed, or a form "
                "of it that is not translated"
            )
            raise InputError(message)
        if any(output.uses() for output in node.outputs[1:]) and node.op_type not in _MULTIPLE:
            message = f"{self._where(node)}: the further outputs of {node.op_type} are in use"
            raise InputError(message)
        arguments = self._arguments(node, attributes)
        try:
            inspect.signature(OPERATORS[node.op_type]).bind(*inputs, **arguments)
        except (TypeError, ValueError) as error:
            if isinstance(error, TypeError):
                raise self._failed(node, error) from error
        operands = [None if one is None else self._operand(one) for one in inputs]
        called = self.graph.call_function(compute, (node.op_type, *operands), arguments)
        if node.op_type not in _MULTIPLE:
            self._set(node, called)
            return
        for place in range(len(node.outputs)):
            self._set(node, self.graph.call_function(operator.getitem, (called, place)), place)

    def _arguments(self, node: ir.Node, attributes: dict[str, Any]) -> dict[str, Any]:
        if node.op_type == "Split":
            return {**attributes, "parts": len(node.outputs)}
        if isinstance(attributes.get("value"), torch.Tensor):
            return {**attributes, "value": attributes["value"].flatten()[0].item()}
        return attributes

    def _operand(self, value: fx.Node | Constant) -> Any:
        """What stands for `value` in the arguments of a call."""
        if isinstance(value, fx.Node):
            return value
        if not isinstance(value.value, torch.Tensor):
            return value.value
        # Named at the end, when the layers have taken the names of theirs.
        node = self.graph.get_attr(f"pending_{len(self.pending)}")
        self.pending.append((node, value))
        return node

    def _placed(self, constant: Constant) -> str:
        """The name of the parameter or buffer that holds `constant`."""
        key = id(constant.value)
        if key not in self.placed:
            wanted = self._module_name(constant.name, of_layer=False)
            name = free_name(self.root, wanted or f"constant_{len(self.placed)}")
            trained = constant.name in self.onnx.initializers
            place_tensor(self.root, name, constant.value, trained=trained)
            self.placed[key] = name
            self.kept.append(constant.value)
        return self.placed[key]

    # Layers.

    def _add_layer(self, node: ir.Node, inputs: list[Any], attributes: dict[str, Any]) -> bool:
        """Add a layer for `node`, if it is one."""
        weight = inputs[1] if len(inputs) > 1 else None
        if not isinstance(weight, Constant) or not isinstance(inputs[0], fx.Node):
            return False
        if not isinstance(weight.value, torch.Tensor) or not weight.value.is_floating_point():
            return False
        if node.op_type == "MatMul" and weight.value.ndim == 2:
            self._add_matmul(node, inputs[0], weight)
            return True
        bias = inputs[2] if len(inputs) > 2 else None
        if bias is not None and not isinstance(bias, Constant):
            return False
        if node.op_type == "Gemm" and not attributes.get("transA"):
            self._add_gemm(node, inputs[0], weight, bias, attributes)
            return True
        if node.op_type == "Conv":
            self._add_convolution(node, inputs[0], weight, bias, attributes)
            return True
        if node.op_type == "ConvTranspose":
            self._add_transposed(node, inputs[0], weight, bias, attributes)
            return True
        return False

    def _add_matmul(self, node: ir.Node, x: fx.Node, weight: Constant) -> None:
        """The product, with the addition behind it if that is a bias."""
        last, bias = node, None
        uses = tuple(node.outputs[0].uses())
        if len(uses) == 1 and not node.outputs[0].is_graph_output():
            behind = uses[0].node
            others = [one for one in behind.inputs if one is not node.outputs[0]]
            if behind.op_type == "Add" and len(others) == 1 and others[0] is not None:
                found = self.values.get(str(others[0].name))
                if isinstance(found, Constant) and is_bias(found.value, weight.value.shape[1]):
                    last, bias = behind, replace(found, value=found.value.flatten())
                    self.done.add(id(behind))
        key = (identity(weight), identity(bias))
        name = self._layer(node, key, weight, bias, lambda: linear(
            weight.value.t(), None if bias is None else bias.value
        ))  # fmt: skip
        self._set(last, self.graph.call_module(name, (x,)))

    def _add_gemm(
        self, node: ir.Node, x: fx.Node, weight: Constant, bias: Constant | None,
        attributes: Mapping[str, Any],
    ) -> None:  # fmt: skip
        alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
        matrix = weight.value if attributes.get("transB") else weight.value.t()
        offset = None
        if bias is not None:
            offset = (torch.as_tensor(bias.value) * beta).expand(1, matrix.shape[0])[0]
        key = (identity(weight), identity(bias))
        name = self._layer(
            node, (*key, alpha, beta), weight, bias, lambda: linear(matrix * alpha, offset)
        )
        self._set(node, self.graph.call_module(name, (x,)))

    def _add_convolution(
        self, node: ir.Node, x: fx.Node, weight: Constant, bias: Constant | None,
        attributes: Mapping[str, Any],
    ) -> None:  # fmt: skip
        found = geometry(node, weight.value, attributes, self._where(node))
        same, before, after, strides, dilations = found
        if not same:
            axes = list(range(2, weight.value.ndim))
            x = self.graph.call_function(padded, (x, before, after, axes))
        key = (identity(weight), identity(bias), str(found))
        name = self._layer(node, key, weight, bias, lambda: convolution(
            weight.value, None if bias is None else bias.value, strides=strides,
            padding=before if same else None, dilations=dilations,
            groups=attributes.get("group", 1),
        ))  # fmt: skip
        self._set(node, self.graph.call_module(name, (x,)))

    def _add_transposed(
        self, node: ir.Node, x: fx.Node, weight: Constant, bias: Constant | None,
        attributes: Mapping[str, Any],
    ) -> None:  # fmt: skip
        count = weight.value.ndim - 2
        pads = attributes.get("pads") or [0] * (2 * count)
        if pads[:count] != pads[count:] or attributes.get("auto_pad", "NOTSET") != "NOTSET":
            message = f"{self._where(node)}: ConvTranspose with padding that differs by side"
            raise InputError(message)
        function = (
            functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d
        )[count - 1]  # fmt: skip
        called = self.graph.call_function(function, (
            x, self._operand(weight), None if bias is None else self._operand(bias),
            attributes.get("strides") or [1] * count, pads[:count],
            attributes.get("output_padding") or [0] * count, attributes.get("group", 1),
            attributes.get("dilations") or [1] * count,
        ))  # fmt: skip
        self._set(node, called)

    def _layer(
        self, node: ir.Node, key: tuple[Any, ...], weight: Constant, bias: Constant | None,
        make: Any,
    ) -> str:  # fmt: skip
        """The name of the layer, which is made once however often the graph calls it."""
        if key not in self.layers:
            name = free_name(self.root, self._layer_name(node, weight, bias))
            place_module(self.root, name, make())
            self.layers[key] = name
            self.kept += [one.value for one in (weight, bias) if one is not None]
        return self.layers[key]

    # Names.

    def _layer_name(self, node: ir.Node, weight: Constant, bias: Constant | None) -> str:
        kind = "conv" if node.op_type == "Conv" else "linear"
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        noted = ast.literal_eval(scopes)[-2:-1] if scopes.startswith("[") else []
        candidates = (
            weight.name if weight.name.rpartition(".")[2] in ("weight", "kernel") else "",
            noted[0] if noted else "",
            str(node.name or "") if "/" in str(node.name or "").strip("/") else "",
            bias.name if bias is not None and bias.name.endswith(".bias") else "",
            weight.name if not weight.name.startswith(_NO_INTERNAL_NAME) else "",
        )
        for candidate in candidates:
            name = self._module_name(candidate, of_layer=True)
            if name and not name.replace(".", "").isdecimal():
                return name
        count = sum(self_name.startswith(kind) for self_name in self.layers.values())
        return f"{kind}_{count}"

    def _module_name(self, name: str, *, of_layer: bool) -> str:
        return tidy_name(name, of_layer=of_layer).removeprefix(self.prefix)

    def _where(self, node: ir.Node) -> str:
        return f"{self.file.path}: node {node.name or node.outputs[0].name}"

    def _failed(self, node: ir.Node, error: Exception) -> InputError:
        message = (
            f"{self._where(node)}: this form of {node.op_type} is not translated "
            f"({type(error).__name__}: {error})"
        )
        return InputError(message)
