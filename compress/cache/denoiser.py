"""One denoiser with its gates, and what a call of it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vcompress.compress.cache.contract import bind
from vcompress.compress.cache.gates import ContextGate, ForwardGate, install, uninstall
from vcompress.compress.cache.stack import find_stack
from vcompress.compress.cache.state import BranchState
from vcompress.spec.errors import InputError

__all__ = ["TIMESTEPS", "Denoiser", "ModelCall"]

# Names of the argument that tells the step, in the order in which they are looked for.
TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "sigmas")


@dataclass(frozen=True)
class ModelCall:
    """What a denoiser was given.

    Attributes:
        latent: its first tensor.
        timestep: the largest, where tokens have timesteps of their own.
        conditions: everything else, by name.
    """

    latent: torch.Tensor
    timestep: float
    conditions: Mapping[str, Any]


@dataclass
class Denoiser:
    """A denoiser of the run.

    Attributes:
        name: "transformer" or "transformer_2" in a pipeline; empty for one alone.
        module: itself.
        blocks: full names within it, in the order of the module.
        timestep: name of the argument.
        branches: what is kept, by guidance branch.
        links: the contract as far as it is known, by class of block.
        context, told_step, told_num_steps: what the pipeline says about the call.
    """

    name: str
    module: nn.Module
    blocks: tuple[str, ...]
    timestep: str = ""
    branches: dict[str, BranchState] = field(default_factory=dict)
    links: dict[type, dict[int, str]] = field(default_factory=dict)
    context: str | None = None
    told_step: int | None = None
    told_num_steps: int | None = None
    _gates: list[tuple[Any, str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls, name: str, module: nn.Module, blocks: tuple[str, ...], timestep: str | None
    ) -> Denoiser:
        """Look at `module`; `blocks` and `timestep` are found if they are not given."""
        made = cls(name=name, module=module, blocks=find_stack(module, blocks))
        parameters = ForwardGate("", module.forward, _never).signature.parameters
        wanted = TIMESTEPS if timestep is None else (timestep,)
        found = [name for name in wanted if name in parameters]
        if not found:
            message = (
                f"{type(module).__name__}.forward must take the timestep, by which steps are told "
                f"apart, as one of {', '.join(wanted)}; it takes {', '.join(parameters)}; name the "
                "argument with timestep="
            )
            raise InputError(message)
        made.timestep = found[0]
        return made

    def full_name(self, block: str) -> str:
        """`block` with the name of the denoiser in front, where there are several."""
        return f"{self.name}.{block}" if self.name else block

    def tell(self, context: str | None, step: int | None, num_steps: int | None) -> None:
        """What the pipeline says about the calls that follow."""
        self.context, self.told_step, self.told_num_steps = context, step, num_steps

    def install(
        self, model: Callable[[Denoiser, ForwardGate, tuple[Any, ...], dict[str, Any]], Any],
        block: Callable[[Denoiser, ForwardGate, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:  # fmt: skip
        """Put the gates in place; they hand calls of the model and of its blocks over."""
        for name, receive in (("", model), *((name, block) for name in self.blocks)):
            module = self.module.get_submodule(name)
            gate = ForwardGate(name, module.forward, _Bound(self, receive))
            self._put(module, "forward", gate)
        enter: Any = getattr(self.module, "cache_context", None)
        if callable(enter):
            self._put(self.module, "cache_context", ContextGate(enter, self))

    def uninstall(self) -> None:
        """Take the gates away, and forget everything."""
        for owner, method, gate in reversed(self._gates):
            uninstall(owner, method, gate)
        self._gates = []
        self.branches = {}

    def _put(self, owner: Any, method: str, gate: Any) -> None:
        install(owner, method, gate)
        self._gates.append((owner, method, gate))

    def read(self, gate: ForwardGate, positional: tuple[Any, ...], keywords: Any) -> ModelCall:
        """What one call of the denoiser is given.

        Raises:
            InputError: no tensor, or no timestep among it.
        """
        arguments = bind(gate.signature, positional, keywords)
        timestep = arguments.pop(self.timestep, None)
        names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
        if timestep is None or not names:
            message = (
                f"a cached denoiser must be called with a latent and with {self.timestep}; got "
                f"{', '.join(arguments) or 'nothing'}"
            )
            raise InputError(message)
        latent = arguments.pop(names[0])
        largest = timestep.max() if isinstance(timestep, torch.Tensor) else timestep
        return ModelCall(latent, float(largest), arguments)


@dataclass
class _Bound:
    """A receiver that also gets the denoiser; an object, so that a copy of it is a copy."""

    denoiser: Denoiser
    receive: Callable[[Denoiser, ForwardGate, tuple[Any, ...], dict[str, Any]], Any]

    def __call__(self, gate: ForwardGate, positional: tuple[Any, ...], keywords: Any) -> Any:
        return self.receive(self.denoiser, gate, positional, keywords)


def _never(*_: Any) -> None:
    raise AssertionError
