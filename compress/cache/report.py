"""What a cache did: for every block and step how often it was asked, and how often it reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CacheReport", "Tally", "tenths"]

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Counts over all calls since the cache was applied.

    Attributes:
        policy: by name.
        blocks: full names, in order; rows of the arrays.
        calls: how often the model came to a block at a step, `[blocks, steps]`.
        consulted: how often the policy was asked about it.
        hits: how often it was skipped, so never more than `consulted`.
        branch_hits: `hits` of each guidance branch.
        changes: of each branch, what the policy's formula calls the change of a step, in the last
            generation; nan where nothing was compared. The mean over blocks that decide for
            themselves.
        num_generations: that were started.
        state_bytes: most that was kept at a time, in all branches together.
        notes: what a person should know.
    """

    policy: str
    blocks: tuple[str, ...]
    calls: Counts
    consulted: Counts
    hits: Counts
    branch_hits: Mapping[str, Counts]
    changes: Mapping[str, tuple[float, ...]]
    num_generations: int
    state_bytes: int
    notes: tuple[str, ...]

    @property
    def skip_rate(self) -> float:
        """Share of all block calls that were skipped."""
        return float(self.hits.sum() / max(1, self.calls.sum()))

    @classmethod
    def together(cls, reports: Sequence[CacheReport]) -> CacheReport:
        """Counts of runs of one policy on one model, added up."""
        first = reports[0]
        return cls(
            policy=first.policy,
            blocks=first.blocks,
            calls=np.sum([each.calls for each in reports], axis=0),
            consulted=np.sum([each.consulted for each in reports], axis=0),
            hits=np.sum([each.hits for each in reports], axis=0),
            branch_hits={
                branch: np.sum([each.branch_hits[branch] for each in reports], axis=0)
                for branch in first.branch_hits
            },
            changes=reports[-1].changes,
            num_generations=sum(each.num_generations for each in reports),
            state_bytes=max(each.state_bytes for each in reports),
            notes=tuple(dict.fromkeys(note for each in reports for note in each.notes)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a report file."""
        return {
            "policy": self.policy,
            "skip_rate": self.skip_rate,
            "num_generations": self.num_generations,
            "state_bytes": self.state_bytes,
            "notes": list(self.notes),
            "blocks": list(self.blocks),
            "calls": self.calls.tolist(),
            "consulted": self.consulted.tolist(),
            "hits": self.hits.tolist(),
            "branches": {
                branch: {
                    "hits": self.branch_hits[branch].tolist(),
                    "changes": [None if value != value else value for value in changes],
                }
                for branch, changes in self.changes.items()
            },
        }

    def __str__(self) -> str:
        lines = [
            f"{self.policy}: {self.skip_rate:.1%} of block calls reused, "
            f"{self.num_generations} generations, {self.state_bytes / 2**20:.1f} MiB kept",
            *(f"- {note}" for note in self.notes),
            "one column a step; # computed, . reused, 1-9 tenths reused, blank never reached",
        ]
        width = max(map(len, self.blocks))
        lines += [
            f"{name:{width}} {''.join(map(tenths, hits, calls))}"
            for name, hits, calls in zip(self.blocks, self.hits, self.calls, strict=True)
        ]
        return "\n".join(lines)


def tenths(part: np.int64, whole: np.int64) -> str:
    """One character of a map: "." for all of it, "#" for none, else tenths; blank of nothing."""
    if not whole:
        return " "
    if part in (0, whole):
        return "." if part else "#"
    return str(min(9, max(1, round(10 * part / whole))))


@dataclass
class Tally:
    """Counts while a cache runs. Keys of the counters are (branch, block, step)."""

    calls: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    consulted: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    hits: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    changes: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    model_calls: Counter[str] = field(default_factory=Counter)
    num_generations: int = 0
    state_bytes: int = 0
    notes: dict[str, None] = field(default_factory=dict)

    def count(self, branch: str, block: str, step: int, *, asked: bool, hit: bool) -> None:
        """Count one block that the model came to."""
        key = (branch, block, step)
        self.calls[key] += 1
        self.consulted[key] += asked
        self.hits[key] += hit

    def start(self) -> None:
        """A generation begins."""
        self.num_generations += 1
        self.changes = {}

    def note_change(self, branch: str, step: int, change: float) -> None:
        """The change that a decision saw."""
        self.changes.setdefault(branch, {}).setdefault(step, []).append(change)

    def report(self, policy: str, blocks: tuple[str, ...]) -> CacheReport:
        """The counts as arrays."""
        num_steps = 1 + max((step for _, _, step in self.calls), default=-1)
        branches = list(dict.fromkeys(branch for branch, _, _ in self.calls))
        return CacheReport(
            policy=policy,
            blocks=blocks,
            calls=_array(self.calls, blocks, num_steps, branches),
            consulted=_array(self.consulted, blocks, num_steps, branches),
            hits=_array(self.hits, blocks, num_steps, branches),
            branch_hits={
                branch: _array(self.hits, blocks, num_steps, [branch]) for branch in branches
            },
            changes={
                branch: tuple(
                    float(np.mean(steps[step])) if step in steps else float("nan")
                    for step in range(num_steps)
                )
                for branch, steps in self.changes.items()
            },
            num_generations=self.num_generations,
            state_bytes=self.state_bytes,
            notes=tuple(self.notes),
        )


def _array(
    counts: Counter[tuple[str, str, int]], blocks: tuple[str, ...], num_steps: int,
    branches: list[str],
) -> Counts:  # fmt: skip
    rows = {name: row for row, name in enumerate(blocks)}
    array = np.zeros((len(blocks), num_steps), dtype=np.int64)
    for (branch, block, step), count in counts.items():
        if branch in branches:
            array[rows[block], step] += count
    return array
