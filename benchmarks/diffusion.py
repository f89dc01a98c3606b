"""Caches on the trained video diffusion transformer: speed against quality, beside their peers.

    python -m vcompress.benchmarks.diffusion [FOLDER] --output benchmarks/results/diffusion

Every family is calibrated to 30 dB on some prompts and seeds and judged on others. The full model
and the cached one take turns, clip by clip, in one process: the speed-up is the median of the
ratios. Peers get settings around 30 dB by hand, which is more than their users have. FOLDER holds
weights that training exported; without it those that ship are taken. Results are written after
every line, so a run that is ended early leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vcompress.compress.cache import CacheSection
from vcompress.pipeline.cache import measured
from vcompress.pipeline.cache_report import hit_map, side_by_side, strip
from vcompress.pipeline.cache_sampler import Case, Sampler, make_cases, open_sampler, read_prompts
from vcompress.pipeline.cache_search import Bar, Search
from vcompress.pipeline.run import Silent
from vcompress.spec.cache_section import SETTINGS
from vcompress.validate.frames import psnr_db, ssim

BAR = Bar("psnr_db", 30.0)
_TOP = 50.0  # dB; what is closer looks the same


class Results:
    """Lines of the table, on disk at every moment."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """Keep and print one line."""
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        self.path.with_suffix(".json").write_text(
            json.dumps({**self.facts, "lines": self.lines}, indent=1) + "\n"
        )


def ours(
    sampler: Sampler,
    search: Search,
    cases: list[Case],
    results: Results,
    policies: list[str],
    *,
    wide: bool,
) -> None:
    """The best rung of every family on the held-out cases; with `wide` one on either side too."""
    families = [one for one in search.ladders() if one.rungs[0].policy in policies]
    trials = {}
    for family in families:
        (found,) = search.run(BAR, [family])
        trials[family.name] = found
        if found.best is None:
            results.add({"whose": "vcompress", "name": family.name, "none_holds": True})
            continue
        rungs = [found.best.section]
        place = family.rungs.index(found.best.section)
        if wide:
            apart = max(1, len(family.rungs) // 10)
            beside = {max(0, place - apart), min(place + apart, len(family.rungs) - 1)} - {place}
            rungs += [family.rungs[each] for each in sorted(beside)]
        for section in rungs:
            full, trial, speed = measured(sampler, section, cases, lambda _done: None)
            results.add({
                "whose": "vcompress", "name": family.name, "section": section.as_dict(),
                "calibrated": section is rungs[0],
                "calibration_psnr_db": statistics.mean(found.best.psnr_db),
                "calibration_skip_rate": found.best.report.skip_rate,
                "psnr_db": statistics.mean(trial.psnr_db), "psnr_db_least": min(trial.psnr_db),
                "ssim": statistics.mean(trial.ssim), "skip_rate": trial.report.skip_rate,
                "speed_up": statistics.median(speed), "speed_ups": list(speed),
                "state_bytes": trial.report.state_bytes,
            })  # fmt: skip
            stem = f"{results.path.name}_{family.name.replace(' ', '_').replace(',', '')}"
            if section is rungs[0]:
                folder = results.path.parent
                (folder / f"{stem}_map.png").write_bytes(hit_map(trial.report))
                (folder / f"{stem}.png").write_bytes(strip(full[0], trial.clips[0]))
                (folder / f"{stem}.webp").write_bytes(side_by_side(full[0], trial.clips[0]))


@contextmanager
def diffusers_cache(sampler: Sampler, config: Any) -> Any:
    """A cache of diffusers on every denoiser."""
    for module in sampler.denoisers:
        module.enable_cache(config)  # type: ignore[operator]
    try:
        yield
    finally:
        for module in sampler.denoisers:
            module.disable_cache()  # type: ignore[operator]


@contextmanager
def cache_dit_cache(sampler: Sampler, threshold: float) -> Any:
    """DBCache of cache-dit with one computed block in front."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
        max_warmup_steps=3, enable_separate_cfg=True, num_inference_steps=sampler.num_steps,
    )  # fmt: skip
    cache_dit.enable_cache(sampler.pipe, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(sampler.pipe)


def peers(sampler: Sampler, magnitudes: tuple[float, ...]) -> dict[str, Callable[[], Any]]:
    """Contexts by name."""
    import diffusers

    made: dict[str, Callable[[], Any]] = {}

    def add(name: str, kind: str, **settings: Any) -> None:
        config = getattr(diffusers, kind, None)
        if config is not None:
            made[name] = lambda: diffusers_cache(sampler, config(**settings))

    for threshold in (0.05, 0.1, 0.2):
        add(f"diffusers FirstBlockCache {threshold}", "FirstBlockCacheConfig", threshold=threshold)
    for threshold in (0.06, 0.24):
        add(
            f"diffusers MagCache {threshold}", "MagCacheConfig", threshold=threshold,
            num_inference_steps=sampler.num_steps, mag_ratios=torch.tensor(magnitudes),
        )  # fmt: skip
    for interval in (2, 3, 4):
        add(
            f"diffusers TaylorSeer {interval}", "TaylorSeerCacheConfig", cache_interval=interval,
            disable_cache_before_step=3, max_order=1,
        )  # fmt: skip
    for threshold in (0.08, 0.2):
        made[f"cache-dit DBCache {threshold}"] = (
            lambda threshold=threshold: cache_dit_cache(sampler, threshold)
        )  # fmt: skip
    made["diffusers FasterCache"] = lambda: diffusers_cache(
        sampler,
        diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            current_timestep_callback=lambda: sampler.pipe.current_timestep,
            attention_weight_callback=lambda _module: 0.3,
            tensor_format="BCFHW",
        ),
    )
    return made


def theirs(
    sampler: Sampler, cases: list[Case], results: Results, magnitudes: tuple[float, ...]
) -> None:
    """Peers on the held-out cases; one that fails leaves its error."""
    for name, context in peers(sampler, magnitudes).items():
        psnrs, likes, ratios = [], [], []
        try:
            for case in cases:
                started = time.perf_counter()
                full = sampler.sample(case)
                between = time.perf_counter()
                with context():
                    entered = time.perf_counter()
                    clip = sampler.sample(case)
                    ended = time.perf_counter()
                psnrs.append(psnr_db(full, clip))
                likes.append(ssim(full, clip))
                ratios.append((between - started) / (ended - entered))
        except Exception as error:  # a peer's failure is a result
            results.add(
                {"whose": "peer", "name": name, "error": f"{type(error).__name__}: {error}"}
            )
            continue
        results.add({
            "whose": "peer", "name": name, "psnr_db": statistics.mean(psnrs),
            "psnr_db_least": min(psnrs), "ssim": statistics.mean(likes),
            "speed_up": statistics.median(ratios), "speed_ups": ratios,
        })  # fmt: skip


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Speed-up against PSNR, ours as dots and peers as crosses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    shown: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "speed_up" in line:
            name = line["name"] if line["whose"] == "vcompress" else line["name"].rsplit(" ", 1)[0]
            shown.setdefault(name, []).append(line)
    for index, (name, points) in enumerate(shown.items()):
        points.sort(key=lambda line: line["speed_up"])
        marker = "o-" if points[0]["whose"] == "vcompress" else "x--"
        axes.plot(
            [p["speed_up"] for p in points], [min(_TOP, p["psnr_db"]) for p in points], marker,
            label=name, color=f"C{index % 10}",
        )  # fmt: skip
    axes.axhline(BAR.least, color="black", linewidth=0.8)
    axes.axvline(2.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up in wall clock, interleaved (x)")
    axes.set_ylabel(f"PSNR against the full model, held-out clips (dB, {_TOP:g} and above as one)")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default="reference:bouncing-garments")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/diffusion"))
    parser.add_argument("--clips", type=int, default=3, help="to calibrate on, and others to judge")
    parser.add_argument("--wide", action="store_true", help="points on either side of each policy")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(SETTINGS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--peers-path", help="a folder with cache-dit, installed with --target")
    arguments = parser.parse_args()
    if arguments.peers_path:
        sys.path.append(arguments.peers_path)
    sampler = open_sampler(arguments.folder)
    calibration, held_out = make_cases(read_prompts(None, sampler), arguments.clips, 0)
    results = Results(arguments.output, {
        "pipeline": sampler.name, "num_steps": sampler.num_steps, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "bar_psnr_db": BAR.least,
        "calibration": [case.name for case in calibration],
        "held_out": [case.name for case in held_out],
    })  # fmt: skip
    search = Search(sampler, calibration, Silent())
    magnitudes = next(
        section.magnitudes
        for ladder in search.ladders()
        for section in ladder.rungs[:1]
        if section.policy == CacheSection(policy="magcache").policy
    )
    if not arguments.peers_only:
        ours(sampler, search, held_out, results, arguments.policies, wide=arguments.wide)
    if not arguments.no_peers:
        theirs(sampler, held_out, results, magnitudes or ())
    plot(results.lines, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
