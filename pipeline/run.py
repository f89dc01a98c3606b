"""The nouns of one run: what is asked for, what comes out, and who watches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vcompress.compress.attention_plan import formats_of
from vcompress.compress.calibration import check_algorithm
from vcompress.compress.context import TokenRequest
from vcompress.spec.budget import Budget
from vcompress.spec.defaults import (
    ALGORITHM,
    ATTENTION,
    MAX_DROP_POINTS,
    MAX_LAYER_ERROR,
    NUM_CLIPS,
)
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.target import find_target
from vcompress.spec.token_section import TokenSection
from vcompress.validate.gate import Verdict
from vcompress.validate.report_types import Report

__all__ = ["AUTO", "Advance", "Options", "Outcome", "Progress", "Recorded", "Silent"]

Advance = Callable[[int], None]

AUTO = "auto"


class Progress(Protocol):
    """Who is told how far a run has come."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """A stage with `total` steps; the context gives the function that takes steps done."""
        ...

    def warn(self, text: str) -> None:
        """Something that the user should know now."""
        ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, _name: str, _total: int | None = None) -> AbstractContextManager[Advance]:
        """A stage that is not shown."""
        return nullcontext(lambda _done: None)

    def warn(self, _text: str) -> None:
        """Nothing."""


class Recorded:
    """Passes everything on to another `Progress`, and keeps the warnings for the report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.warnings: list[str] = []

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """See `Progress`."""
        return self._progress.stage(name, total)

    def warn(self, text: str) -> None:
        """See `Progress`."""
        self.warnings.append(text)
        self._progress.warn(text)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is asked for; the same words as the command line's flags."""

    target: str = "int8"
    calib: str | None = None
    data: str | None = None
    output: Path | None = None
    num_clips: int = NUM_CLIPS
    num_test_clips: int | None = None
    tokens: float | str | None = None
    algorithm: str = ALGORITHM
    attention: str = ATTENTION
    max_layer_error: float = MAX_LAYER_ERROR
    budget_bits: float | None = None
    max_size: int | None = None
    max_latency: float | None = None
    latency_table: str | None = None
    max_drop: float | None = None
    min_sqnr: float | None = None
    min_speedup: float | None = None
    cache: str | None = None
    min_psnr: float | None = None
    dynamic_precision: bool = False
    prompts: Path | None = None
    engine: bool = True
    dynamic: tuple[str, ...] = ()
    seed: int = 0
    force: bool = False
    command: str | None = None

    def __post_init__(self) -> None:
        if self.output is not None:
            object.__setattr__(self, "output", Path(self.output))
        for name, low, high in (
            ("num_clips", 1, 10**6), ("num_test_clips", 1, 10**6), ("max_layer_error", 0, 10),
            ("max_drop", 0, 100), ("min_sqnr", -200, 400), ("seed", 0, 2**31 - 1),
            ("budget_bits", 1, 64), ("max_size", 1, 2**50), ("max_latency", 0.001, 1),
            ("min_psnr", 0, 100), ("min_speedup", 0.01, 1000),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = name.replace("_", "-")
                message = f"--{flag} must lie between {low} and {high}, got {value}"
                raise InputError(message)
        check_algorithm(self.algorithm)
        formats_of(self.attention, find_target(self.target))
        if isinstance(self.tokens, float | int) and not 0 < self.tokens <= 1:
            message = (
                f"--tokens must be above 0 and at most 1 (1 reduces nothing), got {self.tokens}"
            )
            raise InputError(message)
        budgets = (self.budget_bits, self.max_size, self.max_latency)
        if len(budgets) - budgets.count(None) > 1:
            message = "--budget-bits, --max-size and --max-latency are budgets; give one"
            raise InputError(message)
        if any(budgets) and not find_target(self.target).searches:
            message = (
                "--budget-bits, --max-size and --max-latency are for --target mixed, which "
                f"searches formats; {self.target} takes its own in their order"
            )
            raise InputError(message)
        if self.latency_table is not None and self.max_latency is None:
            message = "--latency-table says what formats cost in time: add --max-latency"
            raise InputError(message)
        generates = self.cache is not None or self.dynamic_precision
        if self.min_psnr is not None and not (generates or find_target(self.target).searches):
            message = (
                "--min-psnr is a bar for generated clips, which --cache and --dynamic-precision "
                "make: add one of them, or take --min-sqnr as the bar for single calls"
            )
            raise InputError(message)

    def token_request(self, task: str) -> TokenRequest | None:
        """What `tokens` asks for, for a model of `task`: a share, a search, or a plan's section.

        Raises:
            InputError: a search without a bar, or a file without a section.
        """
        if not isinstance(self.tokens, str):
            return self.tokens
        if self.tokens != AUTO:
            return _section_of(Path(self.tokens))
        if self.min_sqnr is not None:
            # Twice the error is 3 dB: half for tokens, half for what follows.
            return Budget("sqnr_db", self.min_sqnr + 3)
        if task == "classify":
            drop = MAX_DROP_POINTS if self.max_drop is None else self.max_drop
            return Budget("drop_points", drop / 2)
        message = "--tokens auto needs a bar: add --min-sqnr"
        raise InputError(message)

    def budget(self, task: str) -> Budget | None:
        """What formats are searched under for a model of `task`; None for a target in order.

        Raises:
            InputError: the target searches, and nothing limits it.
        """
        if not find_target(self.target).searches:
            return None
        if self.budget_bits is not None:
            return Budget("effective_bits", self.budget_bits)
        if self.max_size is not None:
            return Budget("weight_bytes", self.max_size)
        if self.max_latency is not None:
            return Budget("latency_share", self.max_latency)
        if self.min_sqnr is not None:
            return Budget("sqnr_db", self.min_sqnr)
        if self.min_psnr is not None and task == "denoise":
            # Of single calls, to start with; the search for a cache compares generated clips.
            return Budget("sqnr_db", self.min_psnr)
        if task == "classify":
            drop = MAX_DROP_POINTS if self.max_drop is None else self.max_drop
            return Budget("drop_points", drop)
        message = (
            f"--target {self.target} needs a limit: add --budget-bits, --max-size, --max-latency "
            "or --min-sqnr"
        )
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the artifact is and what was proven."""

    path: Path
    plan: CompressionPlan
    report: Report
    verdict: Verdict


def _section_of(path: Path) -> TokenSection:
    if not path.is_file():
        message = (
            f"--tokens must be a share such as 0.7, {AUTO!r}, or a plan made by vcompress tokens; "
            f"there is no file {path}"
        )
        raise InputError(message)
    section = CompressionPlan.load(path).tokens
    if section is None:
        message = f"{path}: this plan has no section tokens; make one with vcompress tokens"
        raise InputError(message)
    return section
