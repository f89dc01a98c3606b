"""Caches on the trained video diffusion transformer: speed against quality, beside their peers.

    python -m vcompress.benchmarks.diffusion --output benchmarks/results/diffusion \
        --docs docs/caching.md

Every family is searched at 30 dB on some prompts and seeds and confirmed on twice as many other
seeds, as `vcompress cache` does, and judged on other prompts; the automatic choice is the family
that skips most. Peers get the fastest threshold whose mean on the calibration clips reaches 30 dB,
without the margin that ours have to keep, and the next faster one.
Then everything takes turns on each held-out clip, in one process, with the full model in between: a
speed-up is the median over the timed clips of the full model's seconds, before and after, over the
cache's. FOLDER holds weights that training exported; without it those that ship are taken. Results,
table and plot are written after every clip, so a run that is ended early leaves what it has
measured. With the defaults it takes about 40 minutes on one core. `--again` searches nothing: it
judges the automatic choice and the best peer of the stored results once more, on the same held-out
clips, with as many timed as `--timed` says, and puts them in their place.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from vcompress.benchmarks.diffusion_peers import Peer, climbed, peers
from vcompress.benchmarks.diffusion_table import Line, Results, put, verdict
from vcompress.compress.cache import CacheReport, apply_cache
from vcompress.compress.cache.ladder import Ladder
from vcompress.pipeline.cache_report import hit_map, side_by_side, strip
from vcompress.pipeline.cache_sampler import (
    Case,
    Sampler,
    make_cases,
    make_more,
    open_sampler,
    read_prompts,
)
from vcompress.pipeline.cache_search import Bar, Found, Search
from vcompress.pipeline.run import Silent
from vcompress.spec.cache_section import SETTINGS, CacheSection
from vcompress.validate.frames import Frames, psnr_db, ssim

BAR = Bar("psnr_db", 30.0)
# Caches between two runs of the full model.
_BETWEEN_FULL = 6


@dataclass
class Entry:
    """One cache with one setting."""

    line: Line
    sample: Callable[[Case], tuple[Frames, CacheReport | None]]
    shows: bool = False


def ours(sampler: Sampler, search: Search, results: Results, policies: list[str]) -> list[Entry]:
    """The best rung of every family and one that is faster; the best of all families is marked."""
    families = [one for one in search.ladders() if one.rungs[0].policy in policies]
    found: list[tuple[Ladder, Found]] = []
    for family in families:
        found.append((family, search.run(BAR, [family])[0]))
        print(_said(found[-1][1]), flush=True)
    best = max(
        (one.best.report.skip_rate for _, one in found if one.best is not None), default=None
    )
    entries: list[Entry] = []
    for family, one in found:
        facts = {"whose": "vcompress", "name": family.name}
        if one.best is None:
            results.lines.append({**facts, "setting": "nothing holds"})
            continue
        place = family.rungs.index(one.best.section)
        is_best = one.best.report.skip_rate == best
        entries.append(_entry(sampler, one.best.section, {
            **facts, "setting": "found for 30 dB", "automatic": is_best,
            "calibration_psnr_db": mean(one.best.psnr_db), "num_trials": one.num_trials,
        }, shows=True))  # fmt: skip
        beside = min(place + max(1, len(family.rungs) // 12), len(family.rungs) - 1)
        if beside != place:
            faster = family.rungs[beside]
            entries.append(_entry(sampler, faster, {**facts, "setting": "a faster one"}))
    return entries


def _said(found: Found) -> str:
    if found.best is None:
        return f"{found.name}: nothing holds"
    return f"{found.name}: {found.best.psnr_db}, {found.best.report.skip_rate:.1%} skipped"


def _entry(sampler: Sampler, section: CacheSection, line: Line, *, shows: bool = False) -> Entry:
    def sample(case: Case) -> tuple[Frames, CacheReport | None]:
        with apply_cache(sampler.denoisers, section, scheduler=sampler.pipe.scheduler) as cached:
            return sampler.sample(case), cached.report()

    return Entry({**line, "section": section.as_dict()}, sample, shows)


def theirs(
    sampler: Sampler, search: Search, calibration: Sequence[Case], results: Results,
    magnitudes: tuple[float, ...],
) -> list[Entry]:  # fmt: skip
    """Peers; one that fails leaves its error."""
    entries = []
    for peer in peers(sampler, magnitudes):
        try:
            settings = climbed(peer, sampler, calibration, search.full, BAR)
        except Exception as error:  # a peer's failure is a result
            line = {"whose": "peer", "name": peer.name}
            results.lines.append({**line, "error": f"fails: {type(error).__name__}: {error}"})
            continue
        print(peer.name, settings, flush=True)
        entries += [
            _peer_entry(sampler, peer, {"whose": "peer", "name": peer.name, "setting": setting})
            for setting in settings
        ]
    return entries


def _peer_entry(sampler: Sampler, peer: Peer, line: Line) -> Entry:
    def sample(case: Case) -> tuple[Frames, None]:
        with peer.applied(line["setting"]):
            return sampler.sample(case), None

    return Entry(line, sample)


@contextmanager
def _seconds(into: list[tuple[float, float]]) -> Iterator[None]:
    """Append wall clock, and processor time, which does not count what else the machine does."""
    started = time.perf_counter(), time.process_time()
    yield
    into.append((time.perf_counter() - started[0], time.process_time() - started[1]))


def judged(
    sampler: Sampler, entries: list[Entry], cases: Sequence[Case], timed: int, results: Results
) -> None:
    """Everything in turns on every case; the first `timed` of them with the full model between."""
    for entry in entries:
        entry.line.pop("skip_rates", None)
        entry.line |= {"psnr_db": [], "ssim": [], "speed_ups": [], "processor_speed_ups": []}
        if not any(line is entry.line for line in results.lines):
            results.lines.append(entry.line)
    for number, case in enumerate(cases):
        full_seconds: list[tuple[float, float]] = []
        with _seconds(full_seconds):
            full = sampler.sample(case)
        waiting: list[tuple[Line, tuple[float, float]]] = []
        for count, entry in enumerate(entries, 1):
            own: list[tuple[float, float]] = []
            with _seconds(own):
                clip, report = entry.sample(case)
            _note(entry, full, clip, report)
            waiting.append((entry.line, own[0]))
            if number < timed and (count % _BETWEEN_FULL == 0 or count == len(entries)):
                with _seconds(full_seconds):
                    sampler.sample(case)
                for line, seconds in waiting:
                    wall, processor = (
                        mean(each[kind] for each in full_seconds[-2:]) / seconds[kind]
                        for kind in range(2)
                    )
                    line["speed_ups"].append(wall)
                    line["processor_speed_ups"].append(processor)
                waiting = []
            if number == 0 and report is not None and entry.shows:
                _draw(results.path, entry.line["name"], full, clip, report)
        results.save()
        print(f"{number + 1} of {len(cases)} held-out clips", flush=True)


def _note(entry: Entry, full: Frames, clip: Frames, report: CacheReport | None) -> None:
    line = entry.line
    line["psnr_db"].append(psnr_db(full, clip))
    line["ssim"].append(ssim(full, clip))
    if report is not None:
        # Of a rule that looks, the mean over the clips.
        line.setdefault("skip_rates", []).append(report.skip_rate)
        line |= {"skip_rate": mean(line["skip_rates"]), "state_bytes": report.state_bytes}


def again(sampler: Sampler, timed: int, results: Results) -> None:
    """The automatic choice and the best peer of `results` once more."""
    chosen = [line for line in results.lines if line.get("automatic")]
    best = verdict(results.summaries(), BAR.least).get("best_peer")
    chosen += [line for line in results.lines if f"{line['name']} {line.get('setting')}" == best]
    known = {peer.name: peer for peer in peers(sampler, ())}
    entries = []
    for line in chosen:
        if line["whose"] == "vcompress":
            entry = _entry(sampler, CacheSection.from_dict(line["section"]), line)
        else:
            entry = _peer_entry(sampler, known[line["name"]], line)
        entry.line = line
        entries.append(entry)
    count = len(results.facts["held_out"])
    _, cases = make_cases(read_prompts(None, sampler), count, 0)
    if [case.name for case in cases] != results.facts["held_out"]:
        message = f"{results.path} was measured on other clips; run without --again"
        raise SystemExit(message)
    names = [f"{line['name']} ({line['setting']})" for line in chosen]
    results.facts["again"] = {"lines": names, "num_timed": timed}
    judged(sampler, entries, cases, timed, results)


def _draw(path: Path, name: str, full: Frames, clip: Frames, report: CacheReport) -> None:
    stem = path.with_name(f"{path.name}_{name.replace(' ', '_')}")
    stem.with_name(f"{stem.name}_map.png").write_bytes(hit_map(report))
    stem.with_suffix(".png").write_bytes(strip(full, clip))
    stem.with_suffix(".webp").write_bytes(side_by_side(full, clip))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default="reference:bouncing-garments")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/diffusion"))
    parser.add_argument("--steps", type=int, help="of a run; by default what the pipeline takes")
    parser.add_argument("--clips", type=int, default=4, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=6, help="others, to judge on")
    parser.add_argument("--timed", type=int, default=3, help="of these, with full ones between")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(SETTINGS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peers-path", help="a folder with cache-dit, installed with --target")
    parser.add_argument("--again", action="store_true", help="the best lines of --output alone")
    parser.add_argument("--docs", type=Path, help="a page between whose marks the table goes")
    arguments = parser.parse_args()
    if arguments.peers_path:
        sys.path.append(arguments.peers_path)
    started = time.perf_counter()
    sampler = open_sampler(arguments.folder, num_steps=arguments.steps)
    if arguments.again:
        results = Results.load(arguments.output)
        again(sampler, arguments.timed, results)
        results.save()
        if arguments.docs is not None:
            put(results.text(), arguments.docs)
        return
    most = max(arguments.clips, arguments.held_out)
    prompts = read_prompts(None, sampler)
    calibration, held_out = make_cases(prompts, most, 0)
    more = make_more(prompts, 2 * arguments.clips, 0)
    calibration, held_out = calibration[: arguments.clips], held_out[: arguments.held_out]
    results = Results(arguments.output, {
        "pipeline": sampler.name, "num_steps": sampler.num_steps, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "bar_psnr_db": BAR.least,
        "calibration": [case.name for case in calibration],
        "confirmed": [case.name for case in more],
        "held_out": [case.name for case in held_out], "num_timed": arguments.timed,
    })  # fmt: skip
    search = Search(sampler, calibration, Silent(), confirm=more)
    entries = ours(sampler, search, results, arguments.policies)
    if not arguments.no_peers:
        magnitudes = next(
            ladder.rungs[0].magnitudes for ladder in search.ladders() if ladder.name == "magcache"
        )
        entries += theirs(sampler, search, calibration, results, magnitudes or ())
    judged(sampler, entries, held_out, arguments.timed, results)
    results.facts["minutes"] = (time.perf_counter() - started) / 60
    results.save()
    if arguments.docs is not None:
        put(results.text(), arguments.docs)


if __name__ == "__main__":
    main()
