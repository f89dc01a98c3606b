"""What stands in front of a model, its blocks and its surroundings while a cache is applied.

Gates are objects that replace a method of one instance, not closures: a deep copy of a model copies
them together with the cache that they belong to. Names, weights and classes stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["ContextGate", "ForwardGate", "SchedulerGate", "install", "uninstall"]

_Receiver = Callable[["ForwardGate", tuple[Any, ...], dict[str, Any]], Any]


class _Told(Protocol):
    def tell(self, context: str | None, step: int | None, num_steps: int | None) -> None: ...


class ForwardGate:
    """In the place of a module's `forward`.

    Attributes:
        name: of the module.
        run: its own forward.
        signature: of `run`; found once, since that takes longer than a small layer does.
    """

    def __init__(self, name: str, run: Callable[..., Any], receive: _Receiver) -> None:
        self.name, self.run, self._receive = name, run, receive
        self.signature = inspect.signature(run)
        # `inspect.signature` follows it, as pipelines that look for an argument do.
        self.__wrapped__ = run

    @property
    def owner(self) -> object:
        """Whose method receives the calls, found anew in a copy."""
        receive = getattr(self._receive, "receive", self._receive)
        return getattr(receive, "__self__", None)

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        """Hand the call over."""
        return self._receive(self, positional, keywords)


class ContextGate:
    """In the place of a model's `cache_context`, with which a pipeline names a guidance branch."""

    def __init__(self, run: Callable[..., Any], told: _Told) -> None:
        self.run, self._told = run, told
        self.__wrapped__ = run

    @contextmanager
    def __call__(self, name: str, **facts: Any) -> Iterator[None]:
        """Pass on what the pipeline says; newer ones say step and number of steps too."""
        self._told.tell(name, facts.get("step_index"), facts.get("num_inference_steps"))
        try:
            with self.run(name, **facts):
                yield
        finally:
            self._told.tell(None, None, None)


class SchedulerGate:
    """In the place of a scheduler's `set_timesteps`, which every generation begins with."""

    def __init__(self, scheduler: Any, begin: Callable[[int], None]) -> None:
        self._scheduler, self._begin = scheduler, begin
        self.run: Callable[..., Any] = scheduler.set_timesteps
        self.__wrapped__ = self.run

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        """Set the timesteps, then begin."""
        result = self.run(*positional, **keywords)
        self._begin(len(self._scheduler.timesteps))
        return result


def install(owner: Any, method: str, gate: Any) -> None:
    """Put `gate` in the place of a method of `owner`, this one instance."""
    setattr(owner, method, gate)


def uninstall(owner: Any, method: str, gate: Any) -> None:
    """Take `gate` away, if it still stands there; what it had replaced comes back."""
    if vars(owner).get(method) is not gate:
        return
    delattr(owner, method)
    # What an instance had of its own, say from a hook of diffusers, is not found in its class.
    if getattr(owner, method, None) != gate.run:
        setattr(owner, method, gate.run)
