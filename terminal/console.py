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
from rich.text import Text

from vcompress.terminal.tables import closing, plain_table

if TYPE_CHECKING:
    from vcompress.compress.latency_table import LatencyTable
    from vcompress.export.capabilities import Capability
    from vcompress.pipeline.revalidate import Validation
    from vcompress.pipeline.run import Outcome
    from vcompress.pipeline.sensitivity import SensitivityTable
    from vcompress.pipeline.tokens import TokenSchedule
    from vcompress.pipeline.tokens_view import TokenView

__all__ = ["Console"]

_FILE_WIDTH = 240
_STATUS_STYLES = {"works": "green", "simulated": "yellow", "missing": "red"}


class Console:
    """One command's output. Implements `pipeline.run.Progress`.

    Attributes:
        json: whether the result is one JSON object.
        out: where results go.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.json, self._quiet = as_json, quiet
        self.out = RichConsole(highlight=False)
        if not self.out.is_terminal:
            # Into a file or a pipe: lines stay whole, so that they can be searched.
            self.out.width = _FILE_WIDTH
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
        from vcompress.validate.closing import closing_notes

        if self.json:
            failed = outcome.verdict.outcome == "fail"
            self.print_json({
                "artifact": str(outcome.path), "exit_code": 3 if failed else 0,
                "report": outcome.report, "error": outcome.verdict.reason if failed else None,
            })  # fmt: skip
            return
        report = outcome.report
        self.out.print(
            Text(
                f"vcompress {report['vcompress']}  {report['model']['name']} -> {report['target']}"
            )
        )
        self.out.print(closing(report))
        for word, text in closing_notes(report):
            self.out.print(Text(f"{word:<8} {text}"))
        self.out.print(Text(f"wrote    {outcome.path}/"))
        self.out.print(Text(f"next     vcompress inspect {outcome.path}"))

    def validation(self, result: Validation) -> None:
        """What `validate` found."""
        if self.json:
            self.print_json({**result.as_dict(), "exit_code": 0 if result.passed else 3})
            return
        table = plain_table(("check", "result"))
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
        self.out.print(table)

    def tokens(self, found: TokenSchedule, path: Path) -> None:
        """What `tokens` found."""
        if self.json:
            self.print_json({**found.as_dict(), "path": str(path)})
            return
        table = plain_table(("block", "patch tokens", "technique"), right=(1,))
        for block, count in found.blocks.items():
            site = found.section.sites.get(block)
            table.add_row(Text(block), str(count), "" if site is None else site.technique)
        self.out.print(table)
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
            self.out.print(Text(f"{word:<11}{text}"))
        for technique, reason in found.refused.items():
            self.out.print(Text(f"without    {technique}: {reason}"))
        self.out.print(Text(f"wrote      {path}"))

    def token_view(self, view: TokenView, path: Path) -> None:
        """What became of the patches of one clip, reduction by reduction."""
        if self.json:
            self.print_json({**view.as_dict(), "path": str(path)})
            return
        self.out.print(Text(
            f"{view.model}  {view.clip}: {view.section.num_patches} patch tokens"
        ))  # fmt: skip
        table = plain_table(
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
        self.out.print(table)
        self.out.print(Text(f"wrote    {path}"))

    def latency(self, table: LatencyTable, path: Path) -> None:
        """Times by operation and format."""
        if self.json:
            self.print_json({**table.as_dict(), "path": str(path)})
            return
        shown = plain_table(("operation", *(f"{name} ms" for name in table.formats)),
                       right=range(1, 1 + len(table.formats)))  # fmt: skip
        seconds = table.seconds
        for operation in dict.fromkeys(each.operation for each in table.entries):
            cells = (seconds.get((operation, name)) for name in table.formats)
            shown.add_row(
                Text(operation), *("-" if cell is None else f"{1e3 * cell:.4g}" for cell in cells)
            )
        self.out.print(shown)
        whole = "" if table.model_seconds is None else f", model {1e3 * table.model_seconds:.4g} ms"
        self.out.print(Text(f"{table.source} with {table.runtime} on {table.device}{whole}"))
        self.out.print(Text(f"table    {path}"))

    def sensitivity(self, table: SensitivityTable, plot: Path) -> None:
        """What each layer costs in each format; the most sensitive layers first."""
        if self.json:
            self.print_json(table.as_dict())
            return
        formats = list(dict.fromkeys(name for row in table.predicted.values() for name in row))
        self.out.print(Text(
            f"{table.model}  {table.loss} with one layer alone in the format, predicted from "
            f"{table.num_clips['prediction']} clips in {table.seconds['predict']:.1f} s"
        ))  # fmt: skip
        shown = plain_table(("layer", "kind", *formats), right=range(2, 2 + len(formats)))
        ordered = sorted(
            table.predicted, key=lambda name: -max(table.predicted[name].values(), default=0.0)
        )
        for name in ordered:
            row = table.predicted[name]
            cells = (f"{row[each]:.2e}" if each in row else "-" for each in formats)
            shown.add_row(Text(name), table.kinds[name], *cells)
        self.out.print(shown)
        for name in table.unreached:
            self.out.print(Text(f"not reached by the clips, kept: {name}"))
        if table.agreement is not None:
            found = table.agreement
            share = table.seconds["predict"] / table.seconds["brute_force"]
            self.out.print(Text(
                f"check    Spearman {found.spearman:.3f} over {found.num_pairs} pairs, "
                f"{found.top_overlap:.0%} of the most sensitive fifth found, plan at "
                f"{found.regret_bits:g} bits {found.regret:+.1%} from the best, in {share:.1%} of "
                f"the {table.seconds['brute_force']:.0f} s of brute force"
            ))  # fmt: skip
        if plot.exists():
            self.out.print(Text(f"wrote    {plot}"))

    def capabilities(self, found: Sequence[Capability]) -> None:
        """The findings of `doctor`."""
        if self.json:
            from dataclasses import asdict

            self.print_json({"capabilities": [asdict(entry) for entry in found]})
            return
        table = plain_table(("", "status", "detail", "remedy"))
        for entry in found:
            style = _STATUS_STYLES.get(entry.status, "")
            table.add_row(
                Text(entry.name), Text(entry.status, style=style), Text(entry.detail),
                Text(entry.remedy or ""),
            )  # fmt: skip
        self.out.print(table)

    def print_json(self, data: dict[str, Any]) -> None:
        """`data` on one line, with its schema and the warnings so far."""
        data = {"schema": 1, **data}
        data.setdefault("warnings", self._warnings)
        print(json.dumps(data, allow_nan=False))
