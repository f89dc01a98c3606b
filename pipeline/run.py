"""The nouns of one run: what is asked for, what comes out, and who watches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vcompress.spec.defaults import MAX_LAYER_ERROR, NUM_CLIPS, NUM_TEST_CLIPS
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.gate import Verdict
from vcompress.validate.report_types import Report

__all__ = ["Advance", "Options", "Outcome", "Progress", "Silent"]

Advance = Callable[[int], None]


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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is asked for; the same words as the command line's flags."""

    target: str = "int8"
    calib: str | None = None
    data: str | None = None
    output: Path | None = None
    num_clips: int = NUM_CLIPS
    num_test_clips: int = NUM_TEST_CLIPS
    tokens: float | None = None
    algorithm: str = "max"
    max_layer_error: float = MAX_LAYER_ERROR
    max_drop: float | None = None
    min_sqnr: float | None = None
    engine: bool = True
    seed: int = 0
    force: bool = False
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the artifact is and what was proven."""

    path: Path
    plan: CompressionPlan
    report: Report
    verdict: Verdict
