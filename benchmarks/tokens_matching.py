"""What one matching costs beside one block; see `benchmarks/tokens.py`.

VideoMAE-B geometry (1,568 tokens of width 768, keys of width 64): the matching alone (likeness,
TopK, argmax), the whole reduction (the same, then gathers and averages) and one block on all
tokens, as ONNX graphs, called in turn. Processor time of this process, the median of calls on one
thread: what other processes do changes it least.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcompress.benchmarks.tokens_clock import RUNTIMES, geometry
from vcompress.compress.tokens.catalog import find_technique
from vcompress.compress.tokens.reduction import Reduction
from vcompress.compress.tokens.view import View
from vcompress.export.graph import export_onnx

__all__ = ["measure", "table"]

# What a block gives away in ramps, the same a few blocks apart, and half of the tokens at once.
MERGES = (65, 150, 784)
_CALLS_A_ROUND = 6


def measure(*, rounds: int) -> dict[str, Any]:
    """Processor time of reductions and of a block, in both runtimes."""
    model = geometry()
    assert model.token_grid is not None
    num_tokens, width = model.token_grid.num_patches, int(model.config["hidden_size"])
    tokens = torch.randn(1, num_tokens, width, generator=torch.Generator().manual_seed(0))
    modules: dict[str, nn.Module] = {"block": _Block(model.layer(model.blocks[0]))}
    for few in MERGES:
        modules[f"match {few}"] = _Match(num_tokens - few, width // 12)
        modules[f"reduce {few}"] = _Reduce(num_tokens - few, width // 12)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in modules}
        for name, module in modules.items():
            export_onnx(module.eval(), tokens, paths[name], dialect="portable", dynamic_batch=False)
        for runtime, opener in RUNTIMES.items():
            runners = {name: opener(path, tokens.numpy(), 1) for name, path in paths.items()}
            spent = _processor_ms(runners, rounds)
            rows += [
                {"runtime": runtime, "merges": few, "block_ms": spent["block"],
                 "matching_ms": spent[f"match {few}"], "reduction_ms": spent[f"reduce {few}"]}
                for few in MERGES
            ]  # fmt: skip
            print(*rows[-len(MERGES) :], sep="\n", flush=True)
    return {"geometry": dict(model.config), "rows": rows}


def _processor_ms(runners: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            for _call in range(1 if name == "block" else _CALLS_A_ROUND):
                started = time.process_time()
                run()
                spent[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(values) for name, values in spent.items()}


class _Match(nn.Module):
    """One matching alone; the keys are the first channels, as a head's width has them."""

    def __init__(self, keep: int, head_width: int) -> None:
        super().__init__()
        self.keep, self.head_width = keep, head_width

    def decide(self, tokens: torch.Tensor, sizes: torch.Tensor) -> Reduction:
        """Who stays, and who joins whom."""
        view = View(tokens=tokens, sizes=sizes, keys=tokens[..., : self.head_width])
        reducer = find_technique("bipartite", "tokens").reduce(view, self.keep)
        assert isinstance(reducer, Reduction)
        return reducer

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to the places that stay, those that leave and those they join."""
        found = self.decide(tokens, torch.ones_like(tokens[..., 0]))
        return torch.cat([found.kept, found.source, found.target], dim=1)


class _Reduce(_Match):
    """One reduction alone."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to `[B, keep, C]`; sizes are added times 0, or no runtime computed them."""
        sizes = torch.ones_like(tokens[..., 0])
        reduced, new_sizes = self.decide(tokens, sizes).apply(tokens, sizes)
        return reduced + 0 * new_sizes[..., None]


class _Block(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to the same."""
        output = self.block(tokens)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


def table(entries: dict[str, Any]) -> str:
    """Shares of a block, in Markdown."""
    lines = [
        "| runtime | merges | one block, ms | matching, ms | share | whole reduction, ms | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries.values():
        for row in entry["rows"]:
            block = row["block_ms"]
            cells = [
                f"{ms:.1f} | {100 * ms / block:.1f} %"
                for ms in (row["matching_ms"], row["reduction_ms"])
            ]
            lines.append(
                f"| {row['runtime']} | {row['merges']} | {block:.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)
