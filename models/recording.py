"""Record the calls of a denoiser while its pipeline runs.

    with record_calls(pipe.transformer, "calls.pt"):
        for prompt in prompts:
            pipe(prompt, num_inference_steps=20)

The pipeline and the module stay as they are. Which generation, step and branch a call belongs to is
read off its time steps: they fall within a generation, all branches of a step have the same latents
and the same time, and a new generation starts where the time rises, or stays with other latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcompress.models.call_file import RecordedCall, write_calls
from vcompress.models.calls import Call, call_of
from vcompress.spec.errors import InputError

__all__ = ["record_calls"]

_TIMES = ("timestep", "timesteps", "sigma", "t")
# Says what the answer is wrapped in, not what is asked.
_IGNORED = ("return_dict",)


@contextmanager
def record_calls(
    module: nn.Module, path: Path | str, *, every_nth_step: int = 1
) -> Iterator[list[RecordedCall]]:
    """Write every call of `module` within the block to the file `path` when the block ends.

    Tensors keep their types. On an exception nothing is written.

    Args:
        module: the denoiser of a pipeline.
        path: of a `.pt` file, which is replaced if it is there.
        every_nth_step: leave steps out; a fourth of the steps are enough to calibrate on.

    Yields:
        The list of what was recorded so far.

    Raises:
        InputError: `module` was not called, or its calls do not fit together.
    """
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        message = f"{path}: no such folder to write calls to; choose another place"
        raise InputError(message)
    if every_nth_step < 1:
        message = f"every_nth_step must be at least 1, got {every_nth_step}"
        raise InputError(message)
    recorder = _Recorder(module, every_nth_step)
    handle = module.register_forward_pre_hook(recorder.see, with_kwargs=True)
    try:
        yield recorder.calls
    finally:
        handle.remove()
    write_calls(path, type(module).__name__, recorder.calls)


class _Recorder:
    def __init__(self, module: nn.Module, every_nth_step: int) -> None:
        self.calls: list[RecordedCall] = []
        self._signature = inspect.signature(module.forward)
        self._every = every_nth_step
        self._generation, self._step, self._branch = -1, 0, 0
        self._last: tuple[float, torch.Tensor] | None = None

    def see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep one call."""
        call = call_of(_given(self._signature, args, kwargs))
        self._place(call)
        if self._step % self._every:
            return
        self.calls.append(
            RecordedCall(
                call=_copied(call), generation=self._generation, step=self._step,
                branch=self._branch,
            )
        )  # fmt: skip

    def _place(self, call: Call) -> None:
        """Find generation, step and branch of the next call."""
        time, latents = _time(call), next(iter(call.tensors.values()))
        last = self._last
        if last is None or time > last[0]:
            self._start()
        elif time < last[0]:
            self._step, self._branch = self._step + 1, 0
        elif latents.shape == last[1].shape and torch.equal(latents, last[1]):
            self._branch += 1
        else:
            self._start()
        self._last = time, latents.detach().clone()

    def _start(self) -> None:
        self._generation, self._step, self._branch = self._generation + 1, 0, 0


def _given(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name that are not left at their defaults."""
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            message = f"the module takes {name} without names; wrap it in one that names them"
            raise InputError(message)
        else:
            given[name] = value
    return {
        name: value
        for name, value in given.items()
        if name not in _IGNORED and not (value is None or _is_default(signature, name, value))
    }


def _is_default(signature: inspect.Signature, name: str, value: Any) -> bool:
    parameter = signature.parameters.get(name)
    if parameter is None or isinstance(value, torch.Tensor):
        return False
    return type(value) is type(parameter.default) and bool(value == parameter.default)


def _time(call: Call) -> float:
    for name in _TIMES:
        if name in call.tensors:
            # Frames that are given have no noise, and no time, in some models.
            return float(call.tensors[name].max())
    message = (
        f"a denoiser is called with one of {', '.join(_TIMES)}, this module with "
        f"{', '.join(call.flat)}; record the calls of the denoiser itself"
    )
    raise InputError(message)


def _copied(call: Call) -> Call:
    def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: each.detach().cpu().clone() for name, each in tensors.items()}

    return Call(tensors=copied(call.tensors), shared=copied(call.shared), constants=call.constants)
