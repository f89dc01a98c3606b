"""What a person sees: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vcompress.spec import strict_json
from vcompress.spec.artifact import MANIFEST, Artifact
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan

if TYPE_CHECKING:
    from vcompress.compress.latency_table import LatencyTable
    from vcompress.export.capabilities import Capability
    from vcompress.pipeline.revalidate import Validation
    from vcompress.pipeline.run import Outcome
    from vcompress.pipeline.sensitivity import SensitivityTable
    from vcompress.pipeline.tokens import TokenSchedule
    from vcompress.pipeline.tokens_view import TokenView
    from vcompress.spec.attention_section import AttentionChoice
    from vcompress.spec.plan import LayerChoice

__all__ = ["Console"]

_FILE_WIDTH = 240
_STATUS_STYLES = {"works": "green", "simulated": "yellow", "missing": "red"}


class Console:
    """One command's output. Implements `pipeline.run.Progress`."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self._json, self._quiet = as_json, quiet
        self._out = RichConsole(highlight=False)
        if not self._out.is_terminal:
            # Into a file or a pipe: lines stay whole, so that they can be searched.
            self._out.width = _FILE_WIDTH
        self._err = RichConsole(stderr=True, highlight=False)
        self._warnings: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal, one line otherwise; see `pipeline.run.Progress`."""
        started = time.monotonic()
        if self._quiet:
            yield lambda _done: None
        elif total and self._err.is_terminal:
            columns = (
                TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self._err, transient=True) as progress:
                task = progress.add_task(name, total=total)
                yield lambda done: progress.update(task, advance=done)
        else:
            yield lambda _done: None
        if not self._quiet:
            self._err.print(Text(f"{name:<22} {time.monotonic() - started:6.1f} s"))

    def warn(self, text: str) -> None:
        """A warning, at once; also part of `--json`."""
        self._warnings.append(text)
        self._err.print(Text(f"warning: {text}", style="yellow"))

    def outcome(self, outcome: Outcome) -> None:
        """The closing table of `quantize`, `apply` and `demo`."""
        from vcompress.validate.closing import closing_notes, closing_table

        if self._json:
            failed = outcome.verdict.outcome == "fail"
            self._print_json({
                "artifact": str(outcome.path), "exit_code": 3 if failed else 0,
                "report": outcome.report, "error": outcome.verdict.reason if failed else None,
            })  # fmt: skip
            return
        report = outcome.report
        self._out.print(
            Text(
                f"vcompress {report['vcompress']}  {report['model']['name']} -> {report['target']}"
            )
        )
        table = _table(("", "baseline", "result", "change"), right=(1, 2))
        for row in closing_table(report):
            table.add_row(*(Text(cell) for cell in row))
        self._out.print(table)
        for word, text in closing_notes(report):
            self._out.print(Text(f"{word:<8} {text}"))
        self._out.print(Text(f"wrote    {outcome.path}/"))
        self._out.print(Text(f"next     vcompress inspect {outcome.path}"))

    def validation(self, result: Validation) -> None:
        """What `validate` found."""
        if self._json:
            self._print_json({**result.as_dict(), "exit_code": 0 if result.passed else 3})
            return
        table = _table(("check", "result"))
        table.add_row("files", f"{result.num_files} sha256 match")
        table.add_row(
            "golden clips",
            f"relative L2 {result.golden_relative_l2:.1e} (allowed {result.golden_max:.0e})",
        )
        for key in ("num_clips", "baseline_top1_percent", "top1_percent", "agreement_percent",
                    "cosine_min", "sqnr_db"):  # fmt: skip
            value = result.metrics.get(key)
            if value is not None:
                table.add_row(key, f"{value:g}" if isinstance(value, int) else f"{value:.4f}")
        if result.speed is not None:
            table.add_row(
                "speed",
                f"{result.speed.speed_ratio:.2f}x [{result.speed.speed_ratio_lower:.2f}, "
                f"{result.speed.speed_ratio_upper:.2f}] on one core, {result.speed.num_pairs} "
                "fresh process pairs",
            )
        table.add_row("gate", f"{result.verdict.outcome}: {result.verdict.reason}")
        self._out.print(table)

    def tokens(self, found: TokenSchedule, path: Path) -> None:
        """What `tokens` found."""
        if self._json:
            self._print_json({**found.as_dict(), "path": str(path)})
            return
        table = _table(("block", "patch tokens", "technique"), right=(1,))
        for block, count in found.blocks.items():
            site = found.section.sites.get(block)
            table.add_row(Text(block), str(count), "" if site is None else site.technique)
        self._out.print(table)
        facts = [
            ("attention", found.section.attention.replace("_", " ")),
            ("operations", f"{100 * found.flop_share:.1f} % of the model's, by formula"),
        ]
        if found.latency_share is not None:
            facts.append(("latency", f"{100 * found.latency_share:.1f} % of the model's, here"))
        facts += [
            ("loss", f"{found.loss_value:.3g} ({found.loss}) on {found.num_clips} clips"),
            ("changed", f"{found.changed_points:.2f} % of them have another top class"),
            ("measured", f"{found.num_measured} schedules"),
        ]
        if found.section.readout is not None:
            facts.append(("readout", f"{found.section.readout} refitted"))
        for word, text in facts:
            self._out.print(Text(f"{word:<11}{text}"))
        for technique, reason in found.refused.items():
            self._out.print(Text(f"without    {technique}: {reason}"))
        self._out.print(Text(f"wrote      {path}"))

    def token_view(self, view: TokenView, path: Path) -> None:
        """What became of the patches of one clip, reduction by reduction."""
        if self._json:
            self._print_json({**view.as_dict(), "path": str(path)})
            return
        self._out.print(Text(
            f"{view.model}  {view.clip}: {view.section.num_patches} patch tokens"
        ))  # fmt: skip
        table = _table(
            ("before block", "technique", "tokens", "of several patches", "of one", "most patches",
             "patches dropped"),
            right=range(2, 7),
        )  # fmt: skip
        for site in view.sites:
            counts = site.counts()
            table.add_row(
                Text(site.block), site.technique, str(site.keep), str(counts["num_merged_tokens"]),
                str(counts["num_single_tokens"]), str(counts["largest_token"]),
                str(counts["num_dropped_patches"]),
            )  # fmt: skip
        self._out.print(table)
        self._out.print(Text(f"wrote    {path}"))

    def latency(self, table: LatencyTable, path: Path) -> None:
        """Times by operation and format."""
        if self._json:
            self._print_json({**table.as_dict(), "path": str(path)})
            return
        shown = _table(("operation", *(f"{name} ms" for name in table.formats)),
                       right=range(1, 1 + len(table.formats)))  # fmt: skip
        seconds = table.seconds
        for operation in dict.fromkeys(each.operation for each in table.entries):
            cells = (seconds.get((operation, name)) for name in table.formats)
            shown.add_row(
                Text(operation), *("-" if cell is None else f"{1e3 * cell:.4g}" for cell in cells)
            )
        self._out.print(shown)
        whole = "" if table.model_seconds is None else f", model {1e3 * table.model_seconds:.4g} ms"
        self._out.print(Text(f"{table.source} with {table.runtime} on {table.device}{whole}"))
        self._out.print(Text(f"table    {path}"))

    def plan(self, plan: CompressionPlan, path: Path) -> None:
        """A plan, layer by layer."""
        if self._json:
            self._print_json({"plan": plan.as_dict(), "path": str(path)})
            return
        self._print_plan(plan)
        self._out.print(Text(f"next     vcompress apply {path} MODEL --output out/"))

    def sensitivity(self, table: SensitivityTable, plot: Path) -> None:
        """What each layer costs in each format; the most sensitive layers first."""
        if self._json:
            self._print_json(table.as_dict())
            return
        formats = list(dict.fromkeys(name for row in table.predicted.values() for name in row))
        self._out.print(Text(
            f"{table.model}  {table.loss} with one layer alone in the format, predicted from "
            f"{table.num_clips['prediction']} clips in {table.seconds['predict']:.1f} s"
        ))  # fmt: skip
        shown = _table(("layer", "kind", *formats), right=range(2, 2 + len(formats)))
        ordered = sorted(
            table.predicted, key=lambda name: -max(table.predicted[name].values(), default=0.0)
        )
        for name in ordered:
            row = table.predicted[name]
            cells = (f"{row[each]:.2e}" if each in row else "-" for each in formats)
            shown.add_row(Text(name), table.kinds[name], *cells)
        self._out.print(shown)
        for name in table.unreached:
            self._out.print(Text(f"not reached by the clips, kept: {name}"))
        if table.agreement is not None:
            found = table.agreement
            share = table.seconds["predict"] / table.seconds["brute_force"]
            self._out.print(Text(
                f"check    Spearman {found.spearman:.3f} over {found.num_pairs} pairs, "
                f"{found.top_overlap:.0%} of the most sensitive fifth found, plan at "
                f"{found.regret_bits:g} bits {found.regret:+.1%} from the best, in {share:.1%} of "
                f"the {table.seconds['brute_force']:.0f} s of brute force"
            ))  # fmt: skip
        if plot.exists():
            self._out.print(Text(f"wrote    {plot}"))

    def inspect(self, path: Path) -> None:
        """An artifact, a plan, an ONNX file, or a folder that diffusers saved."""
        if (
            any((path / name).is_file() for name in ("model_index.json", "config.json"))
            and not (path / MANIFEST).is_file()
        ):
            self._inspect_models(path)
        elif path.is_dir() or path.name == MANIFEST:
            self._inspect_artifact(Artifact.open(path if path.is_dir() else path.parent))
        elif path.suffix == ".json":
            self.plan(CompressionPlan.load(path), path)
        elif path.suffix == ".onnx":
            self._inspect_onnx(path)
        else:
            message = (
                f"{path}: inspect reads an artifact directory, a plan.json, an .onnx file, or a "
                "folder of a model or pipeline of diffusers"
            )
            raise InputError(message)

    def _inspect_models(self, path: Path) -> None:
        from vcompress.models.look import look

        found = look(path)
        if self._json:
            self._print_json({"models": [one.as_dict() for one in found]})
            return
        table = _table(("model", "class", "parameters", "layers", "blocks", "takes"), right=(2, 4))
        for one in found:
            layers = ", ".join(f"{count} {kind}" for kind, count in one.layers.items())
            table.add_row(
                Text(one.path), one.family, f"{one.num_parameters:,}", layers,
                str(len(one.blocks)), Text(one.inputs),
            )  # fmt: skip
        self._out.print(table)

    def _inspect_artifact(self, artifact: Artifact) -> None:
        plan_path, report_path = artifact.file("plan"), artifact.file("report")
        if plan_path is None or report_path is None:
            message = f"{artifact.path} has no plan or no report; make the artifact again"
            raise InputError(message)
        plan, report = CompressionPlan.load(plan_path), strict_json.read(report_path)
        if self._json:
            self._print_json(
                {"manifest": artifact.manifest, "plan": plan.as_dict(), "report": report}
            )
            return
        from vcompress.validate.closing import closing_notes, closing_table

        self._print_plan(plan)
        table = _table(("", "baseline", "result", "change"), right=(1, 2))
        for row in closing_table(report):
            table.add_row(*(Text(cell) for cell in row))
        self._out.print(table)
        manifest, golden = artifact.manifest, artifact.manifest.get("golden") or {}
        maker = f"vcompress {report['vcompress']}"
        notes = [
            *closing_notes(report),
            ("source", " ".join(str(value) for value in manifest["source"].values())),
            ("golden", ", ".join(f"{key} {value}" for key, value in golden.items())),
            ("made", f"{report['created']} by {maker}: {report['command']}"),
        ]  # fmt: skip
        for word, text in notes:
            self._out.print(Text(f"{word:<9}{text}"), soft_wrap=True)
        files = _table(("file", "role", "bytes", "sha256"), right=(2,))
        for entry in artifact.manifest["files"]:
            files.add_row(
                Text(entry["path"]), entry["role"], f"{entry['bytes']:,}", entry["sha256"][:12]
            )
        self._out.print(files)

    def _inspect_onnx(self, path: Path) -> None:
        from vcompress.export.readback import read_precision

        layers = read_precision(path, prefix="model.").layers
        if self._json:
            self._print_json({
                "layers": {
                    name: {"weight": layer.weight_format, "input": layer.input_format}
                    for name, layer in layers.items()
                }
            })  # fmt: skip
            return
        table = _table(("layer", "weight in the file", "input in the file"))
        for name, layer in layers.items():
            table.add_row(Text(name), layer.weight_format, layer.input_format)
        self._out.print(table)

    def capabilities(self, found: Sequence[Capability]) -> None:
        """The findings of `doctor`."""
        if self._json:
            from dataclasses import asdict

            self._print_json({"capabilities": [asdict(entry) for entry in found]})
            return
        table = _table(("", "status", "detail", "remedy"))
        for entry in found:
            style = _STATUS_STYLES.get(entry.status, "")
            table.add_row(
                Text(entry.name), Text(entry.status, style=style), Text(entry.detail),
                Text(entry.remedy or ""),
            )  # fmt: skip
        self._out.print(table)

    def _print_plan(self, plan: CompressionPlan) -> None:
        grid = plan.model.get("token_grid")
        model, evidence = plan.model, plan.evidence
        self._out.print(Text(
            f"{model.get('name')} ({model.get('family')}) -> {plan.target}, calibrated on "
            f"{evidence.get('num_clips')} clips with {evidence.get('algorithm')}"
            + (f", tokens {'x'.join(map(str, grid))}" if grid else "")
        ))  # fmt: skip
        if plan.tokens is not None:
            sites = ", ".join(
                f"{block} {site.keep} ({site.technique})"
                for block, site in plan.tokens.sites.items()
            )
            attention = plan.tokens.attention.replace("_", " ")
            self._out.print(Text(
                f"tokens   {plan.tokens.num_patches} patches, {attention} attention: {sites}"
            ))  # fmt: skip
        search = evidence.get("search", {})
        if "latency_share_by_table" in search:
            made = search["latency_table"]
            self._out.print(Text(
                f"time     {100 * search['latency_share_by_table']:.1f} % of the float model's by "
                f"the latency table ({made['source']}: {made['runtime']}, {made['device']})"
            ))  # fmt: skip
        table = _table(("layer", "format", "score", "reason"), right=(2,))
        lines: list[tuple[str, LayerChoice | AttentionChoice]] = [*plan.quantize.items()]
        lines += [(f"{name} (QK, PV)", line) for name, line in (plan.attention or {}).items()]
        for name, choice in lines:
            score = "" if choice.score is None else f"{choice.score:.4f}"
            table.add_row(Text(name), choice.format, score, Text(choice.reason))
        self._out.print(table)

    def _print_json(self, data: dict[str, Any]) -> None:
        data = {"schema": 1, **data}
        data.setdefault("warnings", self._warnings)
        print(json.dumps(data, allow_nan=False))


def _table(headers: Sequence[str], right: Sequence[int] = ()) -> Table:
    """A table without frames, which can be pasted."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", overflow="fold")
    return table
