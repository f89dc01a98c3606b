"""Tiny video diffusion transformers of every class that is known, and their calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcompress.benchmarks.denoiser_zoo import CONFIGS, arguments_of, build, record
from vcompress.calib.calls import load_calls
from vcompress.models.load import LoadOptions, load_model, wrap_denoiser
from vcompress.models.video import VideoModel


class Zoo:
    """The tiny denoisers, by the name of their class."""

    names = tuple(CONFIGS)
    build = staticmethod(build)
    arguments = staticmethod(arguments_of)

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, name: str) -> Path:
        """The folder of a saved model."""
        folder = self._root / name
        if not folder.exists():
            build(name).save_pretrained(folder)  # type: ignore[operator]
        return folder

    def calls(self, name: str) -> Path:
        """A file of its calls."""
        path = self._root / f"{name}.pt"
        return path if path.exists() else record(name, build(name), path)

    def load(self, name: str) -> VideoModel:
        """Loaded for its calls."""
        return load_model(str(self.folder(name)), LoadOptions(calls=self.calls(name)))

    def shallow(self, name: str) -> VideoModel:
        """With a single block of each kind: exports take seconds a block."""
        (call,) = load_calls(self.calls(name))[:1].tensors(1)
        return wrap_denoiser(build(name, 1), name=name, call=call, family=name)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))
