"""Commands that measure and compare models and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vcompress.commands.options import check_sources, common, load_options, model_options
from vcompress.spec.errors import InconclusiveError, QualityGateError
from vcompress.spec.files import check_file, replace_file

__all__ = ["bench", "bisect", "compare", "profile"]

_SELFTEST = "selftest"


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="The JSON of an earlier run here, or another artifact, timed in the same run.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the run as JSON.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the verdict for CI.")
@click.option(
    "--history",
    type=click.Path(path_type=Path),
    help="Add a line of JSON to this file, and draw it as an .svg beside it.",
)
@click.option(
    "--runs",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Of selftest: live runs of each kind.",
)
@common
def bench(
    artifact: Path, baseline: Path | None, output: Path | None, junit: Path | None,
    history: Path | None, runs: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Has ARTIFACT become slower? Exit code 0: no, 3: yes, 4: too noisy to tell.

    Without --baseline the run is only recorded; -o main.json makes it a baseline.

    `vcompress bench selftest` shows that an unchanged program is cleared here, and 5 % found.
    """
    from vcompress.terminal.bench import print_bench, print_selftest
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    for flag, path in (("--output", output), ("--junit", junit), ("--history", history)):
        if path is not None:
            check_file(path, flag)
    if str(artifact) == _SELFTEST:
        from vcompress.pipeline.bench_selftest import selftest

        if baseline or junit or history:
            message = "selftest takes --runs and --output only"
            raise click.UsageError(message)
        tested = selftest(runs=runs, progress=console)
        _write(output, tested.as_dict())
        print_selftest(tested, as_json=as_json)
        _end(tested.outcome, tested.reason)
        return
    from vcompress.pipeline import bench as benchmark
    from vcompress.validate import bench_files

    run = benchmark.bench(artifact, baseline=baseline, progress=console)
    data = run.as_dict()
    _write(output, data)
    if junit is not None:
        replace_file(junit, bench_files.junit(data))
    if history is not None:
        bench_files.append_history(data, history)
        picture = bench_files.draw_history(bench_files.read_history(history))
        replace_file(history.with_suffix(".svg"), picture)
    print_bench(run, as_json=as_json)
    if run.verdict is not None:
        _end(run.verdict.outcome, run.verdict.reason)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@common
def compare(artifacts: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """ARTIFACTS side by side: size, speed, quality, gate."""
    del quiet  # there is no progress to be quiet about
    from vcompress.terminal.compare import print_comparison

    print_comparison(artifacts, as_json=as_json)


@click.command()
@click.argument("model")
@click.option(
    "--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Clips of a call."
)
@click.option(
    "--calib", metavar="PATH", help="For a denoiser: a file of calls, for the shapes of its inputs."
)
@click.option(
    "--layers", default=12, show_default=True, type=click.IntRange(0), help="Longest layers shown."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it as JSON.")
@model_options
@common
def profile(
    model: str, batch_size: int, calib: str | None, layers: int, output: Path | None,
    as_json: bool, quiet: bool, **values: Any,
) -> None:  # fmt: skip
    """Where the time of MODEL goes, and what each technique could save at most.

    Of an artifact: where it went, beside that of the model that it was made from.
    """
    check_sources(model, {"calib": calib})
    from dataclasses import replace

    from vcompress.models.load import LoadOptions
    from vcompress.pipeline.profile import profile_model
    from vcompress.pipeline.profile_artifact import profile_artifact
    from vcompress.spec.artifact import MANIFEST
    from vcompress.terminal.console import Console
    from vcompress.terminal.profile import print_profile, print_profile_pair

    load = load_options(values)
    if output is not None:
        check_file(output)
    if (Path(model) / MANIFEST).is_file():
        if calib is not None or load != LoadOptions():
            message = "an artifact knows its model and its inputs: give it no option but these: "
            message += "--batch-size, --output, --json, --quiet"
            raise click.UsageError(message)
        console = Console(as_json=as_json, quiet=quiet)
        pair = profile_artifact(Path(model), batch_size=batch_size, progress=console)
        _write(output, pair.as_dict())
        print_profile_pair(pair, as_json=as_json)
        return
    if calib is not None:
        load = replace(load, calls=Path(calib))
    console = Console(as_json=as_json, quiet=quiet)
    found = profile_model(model, batch_size=batch_size, load=load, progress=console)
    _write(output, found.as_dict())
    print_profile(found, num_layers=layers, as_json=as_json)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("model")
@click.option(
    "--onnx", type=click.Path(path_type=Path), help="Look at this file in place of the artifact's."
)
@model_options
@common
def bisect(
    artifact: Path, model: str, onnx: Path | None, as_json: bool, quiet: bool, **values: Any
) -> None:
    """Find the layer at which the graph of ARTIFACT departs from MODEL under its plan.

    Exit code 0: nowhere, up to rounding ties; 3: the first layer is printed.
    """
    check_sources(model, values)
    import json

    from vcompress.pipeline.bisect import bisect as find
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    found = find(artifact, model, onnx=onnx, load=load_options(values), progress=console)
    if as_json:
        print(json.dumps(found.as_dict(), allow_nan=False))
    else:
        for name in found.changed:
            print(f"changed    {name} is not the file that the manifest describes")
        for each in found.location.departures:
            print(f"departs    {each}")
        print(f"outputs    relative L2 difference {found.relative_l2:.1e}")
    if found.departs:
        raise QualityGateError(found.reason)
    if not as_json:
        print(f"right      {found.reason}")


def _write(path: Path | None, data: object) -> None:
    from vcompress.spec import strict_json

    if path is not None:
        replace_file(path, strict_json.dump(data))


def _end(outcome: str, reason: str) -> None:
    if outcome == "regression":
        raise QualityGateError(reason)
    if outcome == "inconclusive":
        raise InconclusiveError(reason)
