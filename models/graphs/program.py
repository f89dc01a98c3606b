"""Programs of `torch.export` (`.pt2`): linears and convolutions put back as modules.

`torch.export.load` unpickles what a file asks for, and evaluates its expressions of sizes: a `.pt2`
file can run any code when it is loaded. So it is read only where the user trusts it.

Operators of linears and convolutions with a constant weight become modules at the name of the
weight, attention becomes the function of torch that it was, and what only training or tracing
needs (dropout, assertions) is left out. All else stays the ATen operator that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from vcompress.models.graphs.layers import convolution, linear
from vcompress.models.graphs.tree import (
    attribute,
    free_name,
    place_module,
    place_tensor,
    tidy_name,
)
from vcompress.spec.errors import InputError

__all__ = ["Program", "read_program", "rebuilt"]

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_LEFT_OUT: tuple[Any, ...] = (
    _ATEN.dropout.default, _ATEN.feature_dropout.default, _ATEN.alpha_dropout.default,
    _ATEN.native_dropout.default,
)  # fmt: skip
_CONVOLUTIONS: tuple[Any, ...] = (
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.conv1d.padding,
    _ATEN.conv2d.padding, _ATEN.conv3d.padding,
)  # fmt: skip
_TURNS: tuple[Any, ...] = (_ATEN.t.default, _ATEN.numpy_T.default)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program with one tensor in.

    Attributes:
        module: as torch loaded it.
        input_shape: a free axis is None.
        dtype: of the input.
        half: it computes with 16 bits.
    """

    module: fx.GraphModule
    input_shape: tuple[int | None, ...]
    dtype: str
    half: bool


def read_program(path: Path, *, trust_pickle: bool) -> Program:
    """Read `path`.

    Raises:
        InputError: it is not trusted, is damaged, or takes several tensors.
    """
    if not path.is_file():
        message = f"{path}: no such file"
        raise InputError(message)
    if not trust_pickle:
        message = (
            f"{path} is a program of torch.export, and torch.export.load can run any code from a "
            "file. If you trust who made it, add --trust-pickle; better, give an ONNX file, which "
            "holds no code"
        )
        raise InputError(message)
    try:
        program = torch.export.load(path)
        module = program.module(check_guards=False)
    except Exception as error:
        lines = str(error).strip().splitlines()
        message = (
            f"{path} is damaged, or of another version of torch: {type(error).__name__}: "
            f"{lines[0][:300] if lines else ''}"
        )
        raise InputError(message) from error
    signature = program.graph_signature
    values = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in signature.user_inputs
    ]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor):
        message = (
            f"{path} takes {len(values)} inputs; a program of clips takes one tensor. A model of "
            "several tensors is compressed from its module, with recorded calls"
        )
        raise InputError(message)
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        message = (
            f"{path} changes {', '.join(signature.buffers_to_mutate.values()) or 'its input'} when "
            "it runs; export the model in evaluation mode: model.eval()"
        )
        raise InputError(message)
    assert isinstance(module, fx.GraphModule)
    return Program(
        module=module,
        input_shape=tuple(size if isinstance(size, int) else None for size in values[0].shape),
        dtype=str(values[0].dtype).removeprefix("torch."),
        half=any(value.dtype in _HALF for value in module.state_dict().values()),
    )


def rebuilt(program: Program) -> fx.GraphModule:
    """`program` in float32 with modules for its layers."""
    return _Rebuilder(program.module).run()


class _Rebuilder:
    def __init__(self, source: fx.GraphModule) -> None:
        self.source = source
        self.root, self.graph = nn.Module(), fx.Graph()
        self.nodes: dict[fx.Node, Any] = {}
        self.layers: dict[tuple[Any, ...], str] = {}
        self.placed: dict[str, str] = {}

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = self.graph.placeholder("clips")
            elif node.op == "output":
                result = node.args[0]
                first = result[0] if isinstance(result, tuple | list) else result
                self.graph.output(self._value(first))
            elif node.op != "call_function" or self._constant(node) is not None:
                # A transposed weight is made only where something else than a layer reads it.
                continue
            elif not self._add_layer(node):
                self._copy(node)
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def _copy(self, node: fx.Node) -> None:
        if "_assert" in str(node.target) or "sym_constrain" in str(node.target):
            return
        if node.target in _LEFT_OUT:
            self.nodes[node] = self._value(node.args[0])
            return
        if node.target is _ATEN.batch_norm.default and node.args[5]:
            message = f"{node.name} is a normalisation in training mode; export model.eval()"
            raise InputError(message)
        target = node.target
        if target is _ATEN.scaled_dot_product_attention.default:
            target = functional.scaled_dot_product_attention
        args = fx.map_arg(node.args, self._value)
        kwargs = fx.map_arg(node.kwargs, self._value)
        if target is _ATEN.view.default:
            # Of what another batch size may have laid out in another order.
            target = _ATEN.reshape.default
        assert callable(target)
        self.nodes[node] = self.graph.call_function(
            target, tuple(_in_float32(one) for one in args),
            {name: _in_float32(one) for name, one in kwargs.items() if name != "device"},
        )  # fmt: skip

    def _value(self, node: Any) -> Any:
        """What stands for a node in the new graph; constants are read where they are used."""
        if not isinstance(node, fx.Node):
            return node
        if node.op != "get_attr":
            if node not in self.nodes:
                self._copy(node)
            return self.nodes[node]
        name = str(node.target)
        if name not in self.placed:
            value = attribute(self.source, name)
            self.placed[name] = free_name(self.root, name)
            trained = isinstance(value, nn.Parameter)
            place_tensor(self.root, self.placed[name], value.detach(), trained=trained)
        return self.graph.get_attr(self.placed[name])

    def _constant(self, node: Any) -> tuple[str, torch.Tensor] | None:
        """Name and value of a constant, perhaps transposed."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            value = attribute(self.source, str(node.target))
            return (str(node.target), value.detach()) if isinstance(value, torch.Tensor) else None
        turned = node.target in _TURNS or (
            node.target in (_ATEN.transpose.int, _ATEN.permute.default)
            and sorted(_flat(node.args[1:])) in ([0, 1], [-2, -1])
            and (node.target is _ATEN.transpose.int or _flat(node.args[1:])[0] in (1, -1))
        )
        found = self._constant(node.args[0]) if turned else None
        if found is None or found[1].ndim != 2:
            return None
        return found[0], found[1].t()

    def _add_layer(self, node: fx.Node) -> bool:
        """Add a layer for `node`, if it is one."""
        args: list[Any] = [*node.args, *[None] * 9]
        if node.target is _ATEN.linear.default:
            return self._linear(node, args[0], args[1], args[2], stored_as="NK")
        if node.target is _ATEN.addmm.default and not node.kwargs:
            return self._linear(node, args[1], args[2], args[0], stored_as="KN")
        if node.target in (_ATEN.mm.default, _ATEN.matmul.default):
            return self._linear(node, args[0], args[1], None, stored_as="KN")
        if node.target in _CONVOLUTIONS:
            return self._convolution(node, args[0], args[1:7])
        if node.target is _ATEN.convolution.default and not args[6]:
            return self._convolution(node, args[0], [*args[1:6], args[8]])
        return False

    def _linear(self, node: fx.Node, x: Any, weight: Any, bias: Any, *, stored_as: str) -> bool:
        found = self._constant(weight)
        offset = None if bias is None else self._constant(bias)
        is_other = bias is not None and (offset is None or offset[1].ndim != 1)
        if found is None or found[1].ndim != 2 or is_other or self._constant(x) is not None:
            return False
        matrix = found[1] if stored_as == "NK" else found[1].t()
        key = (found[0], stored_as, None if offset is None else offset[0])
        return self._layer(
            node, x, key, lambda: linear(matrix, None if offset is None else offset[1])
        )

    def _convolution(self, node: fx.Node, x: Any, rest: list[Any]) -> bool:
        weight, bias, stride, padding, dilation, groups = rest
        found, offset = self._constant(weight), self._constant(bias)
        if found is None or (bias is not None and offset is None):
            return False
        count = found[1].ndim - 2

        def each(value: Any, default: int) -> Any:
            values = [default] if value is None else value
            return list(values) * count if len(values) == 1 else list(values)

        # "same" and "valid" are words that the modules know, too.
        amounts = padding if isinstance(padding, str) else each(padding, 0)
        key = (found[0], str(rest[2:]), None if offset is None else offset[0])
        return self._layer(node, x, key, lambda: convolution(
            found[1], None if offset is None else offset[1], strides=each(stride, 1),
            padding=amounts, dilations=each(dilation, 1), groups=groups or 1,
        ))  # fmt: skip

    def _layer(
        self, node: fx.Node, x: Any, key: tuple[Any, ...], make: Callable[[], nn.Module]
    ) -> bool:
        if key not in self.layers:
            wanted = tidy_name(str(key[0]), of_layer=True) or "layer"
            self.layers[key] = free_name(self.root, wanted)
            place_module(self.root, self.layers[key], make())
        self.nodes[node] = self.graph.call_module(self.layers[key], (self._value(x),))
        return True


def _flat(values: Any) -> list[int]:
    return [
        one for value in values for one in (value if isinstance(value, list | tuple) else [value])
    ]


def _in_float32(value: Any) -> Any:
    return torch.float32 if value in _HALF else value
