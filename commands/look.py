"""Commands that look at what is there: an artifact, a plan, this machine."""

from __future__ import annotations

from pathlib import Path

import click

from vcompress.commands.options import common, speed_option
from vcompress.spec.errors import QualityGateError

__all__ = ["doctor", "inspect", "validate"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    "clip",
    metavar="CLIP",
    help="Draw which patches of a video, or of the first clip of an .npz or .pt file, are merged.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The picture. Default: tokens.png."
)
@click.option(
    "--model", metavar="MODEL", help="For the picture. Default: what the artifact was made from."
)
@common
def inspect(
    file: Path, clip: str | None, output: Path | None, model: str | None, as_json: bool, quiet: bool
) -> None:
    """What FILE is (an artifact, a plan or an ONNX file): per layer, what was decided and why.

    Of a folder that diffusers saved, a model or a pipeline: which transformers it holds.

    With --tokens, a picture of what the plan in FILE does to the patches of CLIP.
    """
    from vcompress.terminal.console import Console
    from vcompress.terminal.inspection import print_inspection

    console = Console(as_json=as_json, quiet=quiet)
    if clip is None:
        if output is not None or model is not None:
            message = "--output and --model are for the picture: add --tokens CLIP"
            raise click.UsageError(message)
        print_inspection(console, file)
        return
    from vcompress.pipeline.tokens_view import view_tokens

    output = output or Path("tokens.png")
    console.token_view(view_tokens(file, clip, output, source=model, progress=console), output)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", metavar="PATH", help="Other test clips than those of the report.")
@click.option(
    "--max-drop", type=click.FloatRange(0), metavar="POINTS", help="Default: the bar of the report."
)
@speed_option
@click.option(
    "--model",
    metavar="MODEL",
    help="The baseline, for --min-speedup and for --max-drop on --data. Default: what the artifact "
    "was made from.",
)
@common
def validate(
    artifact: Path, data: str | None, max_drop: float | None, min_speedup: float | None,
    model: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Run the proof of ARTIFACT again: hashes, golden clips, test clips, the bars.

    Exit code 3 if a bar is missed. What the clips or the runs are too few to tell is inconclusive,
    which ends with 0 and says how many would do.
    """
    from vcompress.pipeline import revalidate
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    result = revalidate.validate(
        artifact,
        data=data,
        max_drop=max_drop,
        min_speedup=min_speedup,
        model=model,
        progress=console,
    )
    console.validation(result)
    if not result.passed:
        raise QualityGateError(result.reason)


@click.command()
@common
def doctor(as_json: bool, quiet: bool) -> None:
    """What this machine can build, run and only simulate."""
    from vcompress.export.capabilities import capabilities
    from vcompress.terminal.console import Console

    Console(as_json=as_json, quiet=quiet).capabilities(capabilities())
