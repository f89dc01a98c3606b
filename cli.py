"""The command line. Commands parse and print; everything else is `vcompress.pipeline`.

Standard output carries the result, standard error everything else. Exit codes: 0 done and all
gates passed, 1 a bug in vcompress, 2 wrong usage or input, 3 a bar was missed, 4 too noisy
to tell, 5 this machine cannot do it, 6 export or build failed, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys

import click

import vcompress
from vcompress.commands import cache, export, look, make, measure, run, search
from vcompress.spec.errors import MissingCapabilityError, VcompressError

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=make.EXAMPLES,
)
@click.version_option(vcompress.__version__, prog_name="vcompress")
def cli() -> None:
    """Compress a trained video model and prove what it can still do."""


for _command in (
    make.quantize, make.plan, make.apply, make.demo,
    search.sensitivity, search.tokens, search.latency, cache.cache,
    look.inspect, look.validate, look.doctor,
    run.stream, run.run, export.export,
    measure.bench, measure.compare, measure.profile, measure.bisect,
):  # fmt: skip
    cli.add_command(_command)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed; elsewhere this does nothing.

    Activations are buffers of megabytes, which glibc gives back to the kernel at every free and
    takes again, zeroed, at the next layer: up to half of the time of a run on a CPU.
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def main() -> None:
    """Run the command line and end the process with the documented exit code."""
    _keep_freed_memory()
    code, message = _run()
    if message is not None:
        if "--json" in sys.argv and code not in (3, 4):
            # A gate has already printed its report.
            print(json.dumps({"schema": 1, "exit_code": code, "error": message}))
        click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _lacking(error: Exception) -> str | None:
    """What the machine ran out of, if that is what ended the command."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        import tempfile

        where = error.filename or f"the output, or temporary files in {tempfile.gettempdir()}"
        return (
            f"no space left on the disk for {where}; free some, choose another --output, or set "
            "TMPDIR to a folder of a larger disk; nothing half-written was kept"
        )
    # torch has a class of its own for this on a GPU alone.
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or of_torch:
        return (
            f"not enough memory: {str(error) or 'an allocation failed'}; fewer clips (--num-clips, "
            "--num-test-clips) or smaller ones need less"
        )
    return None


def _run() -> tuple[int, str | None]:
    try:
        cli.main(standalone_mode=False)
    except VcompressError as error:
        return error.exit_code, str(error)
    except click.exceptions.Exit as error:
        return error.exit_code, None
    except click.ClickException as error:
        if "--json" in sys.argv:
            return error.exit_code, error.format_message()
        error.show()
        return error.exit_code, None
    except (click.exceptions.Abort, KeyboardInterrupt):
        return 130, "interrupted"
    except Exception as error:
        if os.environ.get("VCOMPRESS_DEBUG"):
            raise
        lacking = _lacking(error)
        if lacking is not None:
            return MissingCapabilityError.exit_code, lacking
        return 1, (
            f"a bug in vcompress: {type(error).__name__}: {error}; please report it with the "
            "output of the same command under VCOMPRESS_DEBUG=1"
        )
    return 0, None


if __name__ == "__main__":
    main()
