"""From a module to an ONNX file in the dialect of a runtime.

The exporter of torch translates what standard ONNX knows; our quantization operators become what
the dialect says. Of the exporter's optimizations only those run that leave weights alone: a folded
weight would no longer be quantized, or would lose the name by which `readback` finds its layer.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn

import vcompress
from vcompress.compress.frozen import FrozenLayer
from vcompress.export.dialects.dialect import Dialect
from vcompress.export.dialects.portable import PORTABLE
from vcompress.export.dialects.tensorrt import TENSORRT
from vcompress.export.replay import DECISION
from vcompress.export.simplify import expand_boolean_where
from vcompress.export.trace import FreeAxes, quiet, trace
from vcompress.models.calls import Batch, Call
from vcompress.spec.errors import BuildError, InputError

__all__ = [
    "DIALECTS", "GraphFacts", "export_onnx", "save_graph", "tidy_graph", "translate_program",
]  # fmt: skip

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {dialect.name: dialect for dialect in (PORTABLE, TENSORRT)}
)
BATCH_AXIS = "batch"
# An ONNX file is one protobuf message, which cannot exceed 2 GiB.
EXTERNAL_DATA_BYTES = 1_800_000_000


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What `export_onnx` wrote.

    Attributes:
        files: the ONNX file first, then its external data, if any.
        dialect: name of the dialect.
        opset: version of the default domain.
        input_shape: sizes of the first input; "batch" where the size is free.
        output_shape: as `input_shape`.
        static_reason: why the batch size is fixed; None if it is free.
        num_nodes: operators in the graph.
        own_operators: types of those that are no part of ONNX, which only the dialect's runtimes
            know.
        num_bytes: of all files.
        inputs: the shapes of all inputs by name, in their order.
    """

    files: tuple[Path, ...]
    dialect: str
    opset: int
    input_shape: tuple[int | str, ...]
    output_shape: tuple[int | str, ...]
    static_reason: str | None
    num_nodes: int
    own_operators: tuple[str, ...]
    num_bytes: int
    inputs: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)


def export_onnx(
    module: nn.Module,
    example: Batch,
    path: Path,
    *,
    dialect: str,
    input_name: str = "pixel_values",
    output_name: str = "output",
    metadata: Mapping[str, str] = MappingProxyType({}),
    dynamic_batch: bool = True,
    free_axes: FreeAxes = MappingProxyType({}),
) -> GraphFacts:
    """Write `module` as the ONNX file `path`, which appears only when it is complete.

    Args:
        module: takes one tensor, or named tensors in a dictionary, and returns one tensor; may
            hold frozen layers.
        example: an input; its first axis is the batch.
        path: of the file; with weights above 1.8 GB they go to `<name>.data` beside it.
        dialect: a key of `DIALECTS`.
        input_name: of the input in the graph; the tensors of a call keep their names.
        output_name: of the output in the graph.
        metadata: goes into the file's metadata_props.
        dynamic_batch: leave the batch size free where the module allows it; else it becomes that
            of the example.
        free_axes: other axes to leave free, by the name of their input in the graph, and what
            their sizes are called there.

    Raises:
        InputError: the dialect is unknown, or its runtimes have no place for a layer's format.
        BuildError: the module cannot be traced, fixes an axis that is to be free, or has an
            operator without translation.
    """
    if dialect not in DIALECTS:
        message = f"unknown dialect {dialect!r}; choose one of: {', '.join(DIALECTS)}"
        raise InputError(message)
    _refuse_formats(module, DIALECTS[dialect])
    with quiet():
        traced = trace(
            module, example, dynamic_batch=dynamic_batch,
            free_axes=free_axes if isinstance(example, Call) or not free_axes
            else {"": free_axes[input_name]},
        )  # fmt: skip
        model = translate_program(traced.program, DIALECTS[dialect])
        tidy_graph(model, traced.program)
    names = list(example.flat) if isinstance(example, Call) else [input_name]
    _rename(model, names, output_name, free_axes)
    model.metadata_props.update(metadata)
    files = save_graph(model, path)
    return GraphFacts(
        files=files,
        dialect=dialect,
        opset=model.opset_imports[""],
        input_shape=_shape(model.graph.inputs[0]),
        output_shape=_shape(model.graph.outputs[0]),
        static_reason=traced.static_reason,
        num_nodes=len(model.graph),
        own_operators=tuple(sorted({node.op_type for node in model.graph if node.domain})),
        num_bytes=sum(file.stat().st_size for file in files),
        inputs={str(value.name): _shape(value) for value in model.graph.inputs},
    )


def _refuse_formats(module: nn.Module, dialect: Dialect) -> None:
    """Raise one `InputError` that names every layer that the runtimes of `dialect` cannot take."""
    refused: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FrozenLayer) and layer.format in dialect.refused:
            refused.setdefault(layer.format, []).append(name or type(layer).__name__)
    if refused:
        lines = [
            f"{format}: {dialect.refused[format]}; {', '.join(names)}"
            for format, names in refused.items()
        ]
        message = (
            f"the {dialect.name} dialect has no place for all formats of this plan; choose another "
            "format for these layers, or use the portable dialect:\n  " + "\n  ".join(lines)
        )
        raise InputError(message)


def _opset(program: torch.export.ExportedProgram, dialect: Dialect) -> int:
    """The oldest opset that has all operators of `program`."""
    operators = [str(node.target) for node in program.graph.nodes]
    return max(
        [
            dialect.opset,
            *(
                opset
                for beginning, opset in dialect.newer_opsets.items()
                if any(name.startswith(f"vcompress.{beginning}") for name in operators)
            ),
        ]
    )


def translate_program(program: torch.export.ExportedProgram, dialect: Dialect) -> ir.Model:
    """The ONNX graph of `program`, as the exporter and the dialect translate it."""
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_opset(program, dialect),
            custom_translation_table=dict(dialect.translations),
            optimize=False,
            verbose=False,
        )
    # The exporter wraps what went wrong in errors of its own; the innermost says it.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        message = f"the ONNX exporter cannot translate the model: {reason}"
        raise BuildError(message) from error
    assert exported is not None
    model = exported.model
    common.InlinePass()(model)
    expand_boolean_where(model)
    dialect.finish(model)
    _name_decisions(model)
    return model


def _name_decisions(model: ir.Model) -> None:
    """Give what passes through `decided` the names by which `replay` finds it, call by call.

    The Identity itself will not outlive the optimizer.
    """
    passed = [
        node
        for node in model.graph
        if node.op_type == "Identity" and re.fullmatch(r"decided(_\d+)?", str(node.outputs[0].name))
    ]
    for number, node in enumerate(passed):
        (places,) = node.inputs
        assert places is not None
        node.outputs[0].name = f"{DECISION}{number}.passed"
        places.name = f"{DECISION}{number}"


def tidy_graph(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Tidy the graph that `program` was translated to, in place; weights are left alone."""
    signature = program.graph_signature
    constants = set(signature.non_persistent_buffers)
    _tidy(model, {*signature.parameters, *signature.buffers}, constants)


def _tidy(model: ir.Model, parameters: set[str], constants: set[str]) -> None:
    """Fold shape arithmetic, drop what nothing uses and what tells of the machine, in place.

    Args:
        parameters: names of parameters and buffers, which are left as they are.
        constants: those of them that are no part of the model's state; of equal ones one is kept.
    """

    def reads_parameter(node: ir.Node) -> bool | None:
        # None leaves the decision to the optimizer's own rules.
        read = any(value is not None and value.name in parameters for value in node.inputs)
        return False if read else None

    optimizer.fold_constants_ir(model, should_fold=reads_parameter)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model, parameters - constants)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    # Stack traces in the metadata of nodes name files of this machine.
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name = "vcompress"
    model.producer_version = vcompress.__version__


def _merge_constants(model: ir.Model, parameters: set[str]) -> None:
    """Keep one of equal constants; parameters stay, since they carry the names of layers."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in parameters or value.const_value is None or value.is_graph_output():
            continue
        tensor = value.const_value
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        twin = kept.setdefault(key, value)
        if twin is not value:
            ir.convenience.replace_all_uses_with(value, twin)
            del model.graph.initializers[name]


def _rename(
    model: ir.Model, input_names: Sequence[str], output_name: str, free_axes: FreeAxes
) -> None:
    """Name inputs, output and the free axes."""
    (result,) = model.graph.outputs
    symbols: dict[Any, str] = {}
    for number, (value, name) in enumerate(zip(model.graph.inputs, input_names, strict=True)):
        value.name = name
        assert value.shape is not None
        wanted = {**({0: BATCH_AXIS} if number == 0 else {}), **free_axes.get(name, {})}
        for axis, called in wanted.items():
            if not isinstance(value.shape[axis], int):
                symbols.setdefault(value.shape[axis], called)
    result.name = output_name
    values = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *values):
        if value.shape is not None and symbols:
            value.shape = ir.Shape([symbols.get(size, size) for size in value.shape])


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def save_graph(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write the files beside their place, check them, then put them there."""
    num_bytes = sum(
        weight.const_value.nbytes
        for weight in model.graph.initializers.values()
        if weight.const_value is not None
    )
    data_name = f"{path.name}.data" if num_bytes > EXTERNAL_DATA_BYTES else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        ir.save(model, written, external_data=data_name)
        try:
            onnx.checker.check_model(str(written))
        except onnx.checker.ValidationError as error:
            message = f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}"
            raise BuildError(message) from error
        if data_name is not None:
            os.replace(Path(folder) / data_name, path.with_name(data_name))
        os.replace(written, path)
    return (path,) if data_name is None else (path, path.with_name(data_name))
