"""What `vcompress run` prints: one line an answer, as soon as it is known."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcompress.spec.errors import InputError

if TYPE_CHECKING:
    from vcompress.export.deployed import Answer, Deployed

__all__ = ["AnswerPrinter", "save_arrays"]

_SMALL = 32


class AnswerPrinter:
    """Answers on standard output, everything else on standard error."""

    def __init__(self, deployed: Deployed, *, as_json: bool, quiet: bool, num_top: int) -> None:
        self._deployed, self._json, self._quiet = deployed, as_json, quiet
        self._num_top = num_top
        self.skipped: list[str] = []

    def start(self, golden_error: float | None) -> None:
        """What runs, where, and what the start took."""
        deployed, start = self._deployed, self._deployed.start
        if self._json:
            self._print_json({
                "artifact": deployed.name, "runtime": deployed.runtime,
                "providers": list(deployed.providers),
                "start_seconds": round(start.engine_seconds + start.other_seconds, 3),
                "engine_seconds": round(start.engine_seconds, 3),
                "golden_relative_l2": golden_error,
            })  # fmt: skip
        elif not self._quiet:
            total = start.engine_seconds + start.other_seconds
            self._note(
                f"{deployed.name} on {deployed.runtime}, {', '.join(deployed.providers)}; started "
                f"in {total:.2f} s, {start.engine_seconds:.2f} s of it the runtime's own"
            )
            if golden_error is not None:
                self._note(f"golden clips: relative L2 {golden_error:.1e}")

    def skip(self, video: str, error: InputError) -> None:
        """A video that could not be used."""
        self.skipped.append(video)
        self._note(f"warning: {error}")
        if self._json:
            self._print_json({"video": video, "error": str(error)})

    def answers(self, answers: Iterable[Answer]) -> list[Answer]:
        """Print all of them; they are returned for `save_arrays`."""
        done = []
        started = time.perf_counter()
        try:
            for answer in answers:
                self._answer(answer)
                done.append(answer)
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough; nothing may be written at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        seconds = time.perf_counter() - started
        if done and not self._quiet and not self._json:
            rate = 1e3 * seconds / len(done)
            self._note(f"{len(done)} clips, {rate:.1f} ms a clip with decoding")
        return done

    def _answer(self, answer: Answer) -> None:
        top = answer.top[: self._num_top]
        if self._json:
            self._print_json({
                "video": answer.video, "start_seconds": _rounded(answer.start_seconds),
                "end_seconds": _rounded(answer.end_seconds),
                "top": [{"label": label, "score": round(score, 6)} for label, score in top],
                "outputs": {name: _described(out) for name, out in answer.outputs.items()},
            })  # fmt: skip
            return
        when = ""
        if answer.start_seconds is not None and answer.end_seconds is not None:
            when = f"  {answer.start_seconds:8.2f} {answer.end_seconds:8.2f}"
        said = "  ".join(f"{score:6.1%} {label}" for label, score in top) or "  ".join(
            f"{name} {list(out.shape)}" for name, out in answer.outputs.items()
        )
        print(f"{answer.video}{when}  {said}", flush=True)

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _print_json(self, data: dict[str, Any]) -> None:
        print(json.dumps({"schema": 1, **data}, allow_nan=False), flush=True)


def save_arrays(answers: list[Answer], path: Path) -> None:
    """All outputs `[n, ...]` by name, with the videos and times, as one .npz file.

    Raises:
        InputError: there are no answers, or the file cannot be written.
    """
    if not answers:
        message = f"there is no answer to write to {path}; give at least one video that is whole"
        raise InputError(message)
    arrays: dict[str, Any] = {
        name: np.stack([answer.outputs[name] for answer in answers]) for name in answers[0].outputs
    }
    for name in ("start_seconds", "end_seconds"):
        times = [getattr(answer, name) for answer in answers]
        if None not in times:
            arrays[name] = np.array(times)
    arrays["videos"] = np.array([answer.video for answer in answers])
    try:
        np.savez_compressed(path, **arrays)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; choose another file"
        raise InputError(message) from error


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _described(output: Any) -> Any:
    """A small vector in full, else its shape: large ones go to a file with --arrays."""
    if output.ndim <= 1 and output.size <= _SMALL and np.isfinite(output).all():
        return output.tolist()
    return {"shape": list(output.shape), "dtype": output.dtype.name}
