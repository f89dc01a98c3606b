"""What `vcompress inspect` and `vcompress plan` print: what was decided, per layer, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from vcompress.spec import strict_json
from vcompress.spec.artifact import MANIFEST, Artifact
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.terminal.tables import closing, plain_table
from vcompress.validate.closing import closing_notes

if TYPE_CHECKING:
    from vcompress.models.look import FoundModel
    from vcompress.spec.attention_section import AttentionChoice
    from vcompress.spec.plan import LayerChoice
    from vcompress.terminal.console import Console

__all__ = ["print_inspection", "print_plan"]

# What the reading of a file says of a weight that is not quantized.
_FLOAT_IN_FILE = "float"


def print_plan(console: Console, plan: CompressionPlan, path: Path) -> None:
    """A plan, layer by layer."""
    if console.json:
        console.print_json({"plan": plan.as_dict(), "path": str(path)})
        return
    _print_lines(console, plan)
    console.out.print(Text(f"next     vcompress apply {path} MODEL --output out/"))


def print_inspection(console: Console, path: Path) -> None:
    """An artifact, a plan, an ONNX file, or a folder that diffusers saved."""
    if (
        any((path / name).is_file() for name in ("model_index.json", "config.json"))
        and not (path / MANIFEST).is_file()
    ):
        _inspect_models(console, path)
    elif path.is_dir() or path.name == MANIFEST:
        _inspect_artifact(console, Artifact.open(path if path.is_dir() else path.parent))
    elif path.suffix == ".json":
        print_plan(console, CompressionPlan.load(path), path)
    elif path.suffix == ".onnx":
        _inspect_onnx(console, path)
    else:
        problem = "is none of what inspect reads" if path.exists() else "does not exist"
        message = (
            f"{path} {problem}; give an artifact directory, a plan.json, an .onnx file, or a "
            "folder of a model or pipeline of diffusers"
        )
        raise InputError(message)


def _inspect_models(console: Console, path: Path) -> None:
    from vcompress.models.look import look

    found = look(path)
    if console.json:
        console.print_json({"models": [one.as_dict() for one in found]})
        return
    _print_models(console, found)


def _print_models(console: Console, found: Sequence[FoundModel]) -> None:
    table = plain_table(("model", "class", "parameters", "layers", "blocks", "takes"), right=(2, 4))
    for one in found:
        layers = ", ".join(f"{count} {kind}" for kind, count in one.layers.items())
        table.add_row(
            Text(one.path), one.family, f"{one.num_parameters:,}", layers,
            str(len(one.blocks)), Text(one.inputs),
        )  # fmt: skip
    console.out.print(table)


def _inspect_artifact(console: Console, artifact: Artifact) -> None:
    plan_path, report_path = artifact.file("plan"), artifact.file("report")
    if plan_path is None or report_path is None:
        message = f"{artifact.path} has no plan or no report; make the artifact again"
        raise InputError(message)
    plan, report = CompressionPlan.load(plan_path), strict_json.read(report_path)
    if console.json:
        console.print_json(
            {"manifest": artifact.manifest, "plan": plan.as_dict(), "report": report}
        )
        return
    _print_lines(console, plan)
    console.out.print(closing(report))
    manifest, golden = artifact.manifest, artifact.manifest.get("golden") or {}
    maker = f"vcompress {report['vcompress']}"
    notes = [
        *closing_notes(report),
        ("source", " ".join(str(value) for value in manifest["source"].values())),
        ("golden", ", ".join(f"{key} {value}" for key, value in golden.items())),
        ("made", f"{report['created']} by {maker}: {report['command']}"),
    ]  # fmt: skip
    for word, text in notes:
        console.out.print(Text(f"{word:<9}{text}"), soft_wrap=True)
    files = plain_table(("file", "role", "bytes", "sha256"), right=(2,))
    for entry in artifact.manifest["files"]:
        files.add_row(
            Text(entry["path"]), entry["role"], f"{entry['bytes']:,}", entry["sha256"][:12]
        )
    console.out.print(files)


def _inspect_onnx(console: Console, path: Path) -> None:
    from vcompress.export.readback import read_precision

    layers = read_precision(path, prefix="model.").layers
    if all(layer.weight_format == _FLOAT_IN_FILE for layer in layers.values()):
        _inspect_graph(console, path)
        return
    if console.json:
        console.print_json({
            "layers": {
                name: {"weight": layer.weight_format, "input": layer.input_format}
                for name, layer in layers.items()
            }
        })  # fmt: skip
        return
    table = plain_table(("layer", "weight in the file", "input in the file"))
    for name, layer in layers.items():
        table.add_row(Text(name), layer.weight_format, layer.input_format)
    console.out.print(table)


def _inspect_graph(console: Console, path: Path) -> None:
    """An ONNX file in floating point, which can be compressed."""
    from vcompress.models.graphs.look import look_at_onnx

    found = look_at_onnx(path)
    if console.json:
        console.print_json(found.as_dict())
        return
    _print_models(console, [found.model])
    table = plain_table(("layer", "kind", "weight"))
    for name, facts in found.layers.items():
        table.add_row(Text(name), facts.kind, "x".join(map(str, facts.weight_shape)))
    console.out.print(table)


def _print_lines(console: Console, plan: CompressionPlan) -> None:
    grid = plan.model.get("token_grid")
    model, evidence = plan.model, plan.evidence
    console.out.print(Text(
        f"{model.get('name')} ({model.get('family')}) -> {plan.target}, calibrated on "
        f"{evidence.get('num_clips')} clips with {evidence.get('algorithm')}"
        + (f", tokens {'x'.join(map(str, grid))}" if grid else "")
    ))  # fmt: skip
    if plan.tokens is not None:
        sites = ", ".join(
            f"{block} {site.keep} ({site.technique})" for block, site in plan.tokens.sites.items()
        )
        attention = plan.tokens.attention.replace("_", " ")
        console.out.print(Text(
            f"tokens   {plan.tokens.num_patches} patches, {attention} attention: {sites}"
        ))  # fmt: skip
    search = evidence.get("search", {})
    if "latency_share_by_table" in search:
        made = search["latency_table"]
        console.out.print(Text(
            f"time     {100 * search['latency_share_by_table']:.1f} % of the float model's by "
            f"the latency table ({made['source']}: {made['runtime']}, {made['device']})"
        ))  # fmt: skip
    table = plain_table(("layer", "format", "score", "reason"), right=(2,))
    lines: list[tuple[str, LayerChoice | AttentionChoice]] = [*plan.quantize.items()]
    lines += [(f"{name} (QK, PV)", line) for name, line in (plan.attention or {}).items()]
    for name, choice in lines:
        score = "" if choice.score is None else f"{choice.score:.4f}"
        table.add_row(Text(name), choice.format, score, Text(choice.reason))
    console.out.print(table)
