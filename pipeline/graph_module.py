"""An exported denoiser as a module: a pipeline of diffusers calls it, a runtime computes.

The module is of the class that the pipeline knows, with its configuration and without its weights
and layers. What it is called with goes to the graph under the names that the graph was exported
with, so a call must be of the size that was exported; the batch is free where the graph leaves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vcompress.compress.cache.contract import bind
from vcompress.models.calls import as_computed, call_of, named_arrays
from vcompress.models.empty import empty_module
from vcompress.spec.errors import InputError

__all__ = ["GraphForward", "graph_module"]


class _Runs(Protocol):
    @property
    def input_names(self) -> tuple[str, ...]: ...

    @property
    def output_names(self) -> tuple[str, ...]: ...

    @property
    def input_shape(self) -> tuple[int | None, ...]: ...

    def run_named(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]: ...


class GraphForward:
    """In the place of a module's `forward`.

    Attributes:
        session: the graph in its runtime.
    """

    def __init__(self, module: nn.Module, session: _Runs) -> None:
        self.session = session
        # `inspect.signature` follows it, as pipelines that look for an argument do.
        self.__wrapped__ = module.forward
        self._signature = inspect.signature(module.forward)

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        """One call of the denoiser: a tuple of one tensor, or diffusers' output with it.

        Raises:
            InputError: the call has other tensors, or other sizes, than the graph.
        """
        arguments = bind(self._signature, positional, keywords)
        as_output = arguments.pop("return_dict", True)
        given = {name: value for name, value in arguments.items() if value is not None}
        arrays = named_arrays(as_computed(call_of(given)), ())
        missing = [name for name in self.session.input_names if name not in arrays]
        if missing:
            message = (
                f"the graph was exported with {', '.join(missing)}, which this call has not; "
                "record calls of the same kind, and compress the model anew"
            )
            raise InputError(message)
        self._check_size(arrays[self.session.input_names[0]].shape)
        outputs = self.session.run_named({name: arrays[name] for name in self.session.input_names})
        first = torch.from_numpy(np.ascontiguousarray(outputs[self.session.output_names[0]]))
        if not as_output:
            return (first,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=first)

    def _check_size(self, given: tuple[int, ...]) -> None:
        """Raise if the latents are of another size than the graph's."""
        wanted = self.session.input_shape
        if len(wanted) == len(given) and all(
            each in (None, size) for each, size in zip(wanted, given, strict=True)
        ):
            return
        readable = ", ".join("?" if size is None else str(size) for size in wanted)
        message = (
            f"the graph was exported for [{readable}] as {self.session.input_names[0]}, got "
            f"{list(given)}; generate at the frames, height and width of the calls that it was "
            "compressed with, or record calls of this size and compress the model anew"
        )
        raise InputError(message)


def graph_module(config: Mapping[str, Any], session: _Runs) -> nn.Module:
    """A module of the class in `config` that computes with `session`.

    Raises:
        InputError: the configuration does not make one.
        MissingCapabilityError: diffusers is not installed.
    """
    module = empty_module(config)
    forward = GraphForward(module, session)
    for part in (module._modules, module._parameters, module._buffers):
        part.clear()
    # By it the pipeline sees the type and the device that it works in.
    module.register_buffer("weightless", torch.zeros(0), persistent=False)
    module.__dict__["forward"] = forward
    return module
