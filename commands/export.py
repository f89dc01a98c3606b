"""Commands that make more of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from vcompress.commands.options import common
from vcompress.spec.errors import InputError

__all__ = ["export"]


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    metavar="NAME",
    help="Add what onnxruntime, onnxruntime-cuda, openvino, tensorrt-rtx or tensorrt takes, and "
    "prove it.",
)
@click.option(
    "--sm",
    metavar="SM",
    help="Compute capability that an engine is for: 75, 80, 86, 89, 120 or 121 with tensorrt-rtx, "
    "on any machine; that of the GPU here with tensorrt. Default: 120.",
)
@click.option("--to", "server", metavar="triton|deepstream", help="Write what a server takes.")
@click.option(
    "--input",
    "dtype",
    type=click.Choice(["uint8"]),
    help="Write an artifact that takes pixels as they are: the normalisation moves into the graph.",
)
@click.option(
    "--max-batch",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Of a server, where the batch size is free.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Of --to and --input. Default: ARTIFACT-NAME/.",
)
@click.option("--force", is_flag=True, help="Replace an output that is already there.")
@common
def export(
    artifact: Path, runtime: str | None, sm: str | None, server: str | None, dtype: str | None,
    max_batch: int, output: Path | None, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Make more of ARTIFACT: an engine, a graph for another runtime, other inputs, a server.

    No model is needed: all is made from the artifact's own graphs, read back, and run on its golden
    clips where this machine can run it.
    """
    from vcompress.export.extend import export_runtime
    from vcompress.export.other_input import export_with_input
    from vcompress.pipeline.serving import export_for_server
    from vcompress.terminal.console import Console
    from vcompress.terminal.export import print_extension, print_server

    chosen = [option for option in (runtime, server, dtype) if option is not None]
    if len(chosen) != 1:
        message = "give one of --runtime, --to and --input"
        raise click.UsageError(message)
    if sm is not None and runtime not in ("tensorrt", "tensorrt-rtx"):
        message = "--sm is for an engine: add --runtime tensorrt-rtx or --runtime tensorrt"
        raise click.UsageError(message)
    if runtime is not None and output is not None:
        message = "--runtime adds a file to ARTIFACT; --output is for --to and --input"
        raise click.UsageError(message)
    if sm is not None and not sm.isdecimal():
        message = f"--sm must be a compute capability such as 89 or 120, got {sm!r}"
        raise InputError(message)
    console = Console(as_json=as_json, quiet=quiet)
    output = output or artifact.with_name(f"{artifact.name}-{chosen[0]}")
    with console.stage("export"):
        if runtime is not None:
            made = export_runtime(artifact, runtime, sm=sm or "120")
        elif dtype is not None:
            made = export_with_input(artifact, output, dtype=dtype, force=force)
        else:
            assert server is not None
            files = export_for_server(artifact, output, server, max_batch=max_batch, force=force)
    if server is not None:
        print_server(output, server, files, as_json=as_json)
    else:
        print_extension(made, as_json=as_json)
