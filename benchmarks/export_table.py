"""Model x dialect x (export, parity, build), measured: the table in docs/export.md.

    python benchmarks/export_table.py                       what is missing in the results
    python benchmarks/export_table.py r3d vivit             these alone, also if they are there
    python benchmarks/export_table.py --write docs/export.md   the rows that are there

One process a model, whose row is merged into the results when it is done, so that a run can be
stopped and gone on with. Each model (`export_zoo.py`) is exported in float with as many free axes
as it allows, and run on two inputs, on another batch size and at a second shape; then with all
linears and convolutions in INT8, for ONNX Runtime, for OpenVINO and as an engine.
- float: the largest relative L2 difference from the module, all inputs.
- INT8: the same once values that lie between two codes are rounded alike (see export/ties.py), and
  for OpenVINO its difference from ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from vcompress.benchmarks.export_zoo import FACTORS, GROUPS, MODELS, Case
from vcompress.compress.frozen import freeze
from vcompress.export.dialects.openvino import for_openvino
from vcompress.export.engine import build_engine
from vcompress.export.graph import GraphFacts, export_onnx
from vcompress.export.openvino_runtime import open_openvino
from vcompress.export.readback import read_precision
from vcompress.export.runtime import open_session
from vcompress.export.ties import count_ties
from vcompress.models.calls import Batch, Call, named_arrays
from vcompress.models.convolution_products import with_plain_convolutions
from vcompress.spec.errors import VcompressError

RESULTS = Path(__file__).parent / "results" / "export_table.json"
BEGIN, END = "<!-- export_table: begin -->", "<!-- export_table: end -->"
TOLERANCE = 2e-5
Opener = Callable[[Path], Any]
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_REASON_CHARACTERS = 160


def measure(name: str) -> dict[str, Any]:
    """The row of the model `name`."""
    torch.manual_seed(0)
    case = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        row = _float(case, Path(folder))
        if "float_export" not in row["problems"]:
            row |= _int8(case, Path(folder), row["problems"])
    return row


def _float(case: Case, folder: Path) -> dict[str, Any]:
    """The largest group of free axes that holds at a second shape, in both runtimes."""
    row: dict[str, Any] = {"problems": {}, "fixed": {}}
    for group in GROUPS:
        axes = {
            # How many tokens there are follows from the sizes.
            name: {axis: each for axis, each in of.items() if group and each in (*group, "tokens")}
            for name, of in case.axes.items()
        }
        axes = {name: of for name, of in axes.items() if of}
        named = sorted({each for of in axes.values() for each in of.values()} - {"tokens"})
        if group and (named != sorted(group) or not axes):
            continue
        path = folder / "float.onnx"
        try:
            facts = export_onnx(
                case.module, case.inputs(0, {}), path, dialect="portable", free_axes=axes
            )
            row |= _compared(case, facts, path, group)
        except VcompressError as error:
            (row["fixed"] if group else row["problems"])[", ".join(group) or "float_export"] = (
                _short(error)
            )
            continue
        row |= {
            "free": [*(["batch"] if facts.static_reason is None else []), *group],
            "static_reason": facts.static_reason, "num_nodes": facts.num_nodes,
        }  # fmt: skip
        return row
    return row


def _compared(case: Case, facts: GraphFacts, path: Path, group: tuple[str, ...]) -> dict[str, Any]:
    """The differences of both runtimes, on all inputs.

    Raises:
        VcompressError: an input gives something else, or another shape.
    """
    inputs = [case.inputs(0, {}), case.inputs(1, {})]
    if facts.static_reason is None:
        inputs.append(_stacked([case.inputs(seed, {}) for seed in (2, 3, 4)]))
    if group:
        inputs.append(case.inputs(5, {axis: FACTORS[axis] for axis in group}))
    found: dict[str, Any] = {"shapes": [_shape(each) for each in inputs]}
    openers: dict[str, Opener] = {"onnxruntime": open_session, "openvino": open_openvino}
    for runtime, opener in openers.items():
        session = opener(path)
        errors = [_difference(case.module, session, each) for each in inputs]
        found[f"{runtime}_float"] = max(errors)
        if not max(errors) <= TOLERANCE:
            worst = found["shapes"][errors.index(max(errors))]
            message = f"{runtime} differs by {max(errors):.0e} at {worst}"
            raise VcompressError(message)
    return found


def _difference(module: nn.Module, session: Any, batch: Batch) -> float:
    expected = _torch(module, batch)
    (output,) = session.run_named(named_arrays(batch, session.input_names)).values()
    if output.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


def _torch(module: nn.Module, batch: Batch) -> Any:
    try:
        with torch.inference_mode():
            return module(batch.flat if isinstance(batch, Call) else batch).float().numpy()
    except RuntimeError as error:
        message = f"the model itself does not take {_shape(batch)}: {error}"
        raise VcompressError(message) from error


def _stacked(batches: list[Batch]) -> Batch:
    first = batches[0]
    if not isinstance(first, Call):
        return torch.cat([each for each in batches if isinstance(each, torch.Tensor)])
    calls = [each for each in batches if isinstance(each, Call)]
    tensors = {name: torch.cat([each.tensors[name] for each in calls]) for name in first.tensors}
    return Call(tensors=tensors, shared=first.shared, constants=first.constants)


def _shape(batch: Batch) -> list[int]:
    tensor = next(iter(batch.tensors.values())) if isinstance(batch, Call) else batch
    return list(tensor.shape)


def _quantized(case: Case) -> nn.Module:
    """The module with every layer that can be in INT8."""
    example = case.inputs(0, {})
    # As `models.load` does with what is no part of a pipeline of diffusers.
    module = copy.deepcopy(
        case.module if isinstance(example, Call) else with_plain_convolutions(case.module, example)
    )
    layers = {name: each for name, each in module.named_modules() if type(each) in _LAYERS}
    amax: dict[str, float] = {}
    hooks = [
        each.register_forward_pre_hook(
            lambda _, args, name=name: amax.__setitem__(
                name, max(amax.get(name, 0.0), float(args[0].abs().max()))
            )
        )
        for name, each in layers.items()
    ]
    _torch(module, example)
    for hook in hooks:
        hook.remove()
    for name, reached in amax.items():
        module.set_submodule(name, freeze(layers[name], "int8", reached))
    return module


def _int8(case: Case, folder: Path, problems: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    module, example = _quantized(case), case.inputs(0, {})
    paths = {}
    try:
        for dialect in ("portable", "tensorrt"):
            paths[dialect] = folder / f"{dialect}.onnx"
            export_onnx(module, example, paths[dialect], dialect=dialect)
        formats = read_precision(paths["tensorrt"]).formats.values()
        row["num_int8"], row["num_layers"] = list(formats).count("int8"), len(formats)
        ties = count_ties(module, paths["portable"], case.inputs(1, {}))
        row["onnxruntime_int8"] = ties.forced_relative_l2
        row["unexplained"] = ties.num_unexplained
    except VcompressError as error:
        problems["int8_export"] = _short(error)
        return row
    try:
        row["openvino_int8"] = _openvino_int8(module, paths, folder, case.inputs(1, {}))
    except VcompressError as error:
        problems["openvino_int8"] = _short(error)
    try:
        start = time.perf_counter()
        facts = build_engine(paths["tensorrt"], folder / "model.engine", sm="120")
        row["engine_seconds"], row["engine_bytes"] = time.perf_counter() - start, facts.num_bytes
    except VcompressError as error:
        problems["engine"] = _short(error)
    return row


def _openvino_int8(
    module: nn.Module, paths: Mapping[str, Path], folder: Path, batch: Batch
) -> float:
    path = folder / "openvino.onnx"
    onnx.save(for_openvino(onnx.load(paths["tensorrt"])), path)
    results = []
    for session in (open_session(paths["portable"]), open_openvino(path)):
        (output,) = session.run_named(named_arrays(batch, session.input_names)).values()
        results.append(output)
    return float(np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0]))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _REASON_CHARACTERS else text[:_REASON_CHARACTERS] + " ..."


def table(results: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | free axes | ONNX Runtime, float | OpenVINO, float | layers in INT8 | "
        "ONNX Runtime, INT8 | OpenVINO, INT8 | engine SM120 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for name in (each for each in MODELS if each in results):
        row = results[name]
        cells = [
            name, ", ".join(row.get("free", [])) or "none",
            *(_number(row, key) for key in ("onnxruntime_float", "openvino_float")),
            f"{row['num_int8']} of {row['num_layers']}" if "num_int8" in row else "-",
            *(_number(row, key) for key in ("onnxruntime_int8", "openvino_int8")),
            f"built, {row['engine_bytes'] / 2**20:.1f} MiB" if "engine_bytes" in row else "no",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        reasons = {**row["fixed"], **row["problems"]}
        if row.get("static_reason"):
            reasons["batch"] = row["static_reason"]
        notes += [f"- {name}, {what}: {reason}" for what, reason in reasons.items()]
    return "\n".join(
        [*lines, "", "What is fixed or missing, in the words of the tools:", "", *notes]
    )


def _number(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.0e}" if key in row else "no"


def _write(document: Path, results: Mapping[str, Any]) -> None:
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def main() -> None:
    """Measure what is missing, print or write the table."""
    parser = argparse.ArgumentParser(description="What exports, matches and builds.")
    parser.add_argument("models", nargs="*", metavar="MODEL", choices=[[], *MODELS])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = measure(arguments.row)
        merged = {**_read(arguments.results), arguments.row: row}
        arguments.results.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        return
    if arguments.write:
        _write(arguments.write, _read(arguments.results))
        return
    missing = [name for name in MODELS if name not in _read(arguments.results)]
    for name in arguments.models or missing:
        command = [sys.executable, "-m", "vcompress.benchmarks.export_table", "--row", name,
                   "--results", str(arguments.results)]  # fmt: skip
        done = subprocess.run(command, check=False)
        row = _read(arguments.results).get(name) if done.returncode == 0 else "failed"
        print(name, json.dumps(row)[:600], flush=True)
    print(table(_read(arguments.results)))


if __name__ == "__main__":
    main()
