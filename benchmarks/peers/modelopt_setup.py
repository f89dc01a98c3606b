"""What modelopt's `auto_quantize` is handed: formats in its words, batches, losses, our NVFP4.

See `modelopt_auto` for why each is as it is.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import glob
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from vcompress.calib.clips import Clips
from vcompress.compress.losses import loss_of
from vcompress.compress.numerics.nvfp4 import quantize_dequantize
from vcompress.models.video import VideoModel, primary_output
from vcompress.spec.errors import MissingCapabilityError
from vcompress.spec.formats import FLOAT

__all__ = [
    "BITS", "QUANTIZERS", "Loader", "Loss", "Method", "Steps", "format_of_bits",
    "format_of_recipe", "grouped", "modelopt", "quiet", "search_spaces",
]  # fmt: skip

Method = Literal["gradient", "kl_div"]
Loss = Literal["labels", "probe"]
_BACKEND = "vcompress_peer_nvfp4"
_NVFP4 = {
    "num_bits": (2, 1),
    "effective_bits": 4.5,
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    "backend": _BACKEND,
}
# Format -> what modelopt's presets give the weight quantizer and the input quantizer.
QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nvfp4": (_NVFP4, _NVFP4),
    "int8": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}),
    "fp8": ({"num_bits": (4, 3), "axis": None}, {"num_bits": (4, 3), "axis": None}),
}
BITS = {"nvfp4": 4.5, "int8": 8.0, "fp8": 8.0, FLOAT: 16.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    clips: torch.Tensor
    original: torch.Tensor
    labels: torch.Tensor | None


class Loader:
    """Batches of `clips`, from the beginning again until there are `steps` of them."""

    def __init__(self, model: VideoModel, clips: Clips, batch_size: int, steps: int) -> None:
        self._batches: list[_Batch] = []
        start = 0
        for inputs in clips.batches(batch_size):
            if len(self._batches) == steps:
                break
            labels = None
            if clips.labels is not None:
                labels = torch.tensor(clips.labels[start : start + len(inputs)])
            tensor = torch.from_numpy(inputs)
            # An inference tensor could not take part in what autograd records.
            original = model(tensor).clone()
            self._batches.append(_Batch(clips=tensor, original=original, labels=labels))
            start += len(inputs)
        self._steps = steps

    def __iter__(self) -> Iterator[_Batch]:
        return (self._batches[step % len(self._batches)] for step in range(self._steps))

    def __len__(self) -> int:
        return self._steps


class Steps:
    """The callables that modelopt asks for."""

    def __init__(self, model: VideoModel, method: Method, loss: Loss, seed: int) -> None:
        self._method = method
        self._loss = loss
        self._task_loss = loss_of(model.task)
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, module: torch.nn.Module, batch: _Batch) -> torch.Tensor:
        """Run the module; for "kl_div" the output in the form of logits."""
        output = primary_output(module(batch.clips))
        if self._method == "gradient" or self._task_loss.name == "kl_nats":
            return output
        flat, original = output.flatten(1), batch.original.flatten(1)
        unit = (flat - original) / original.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        return torch.stack((unit, -unit), -1)

    def loss(self, output: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """A scalar whose gradient weighs the errors of layers."""
        if self._loss == "labels":
            assert batch.labels is not None
            return functional.cross_entropy(output, batch.labels)
        probe = self._task_loss.probe(output.detach(), self._generator)
        return (output * probe).sum()


def modelopt() -> Any:
    """Modelopt's quantization package, with our backend registered."""
    try:
        with quiet():
            import modelopt.torch.quantization as quantization
            from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
                register_quant_backend,
            )

            # It warns when this is done again.
            register_quant_backend(_BACKEND, _fake_nvfp4)
    except ImportError as error:
        message = "the peer needs modelopt: pip install nvidia-modelopt==0.47.*"
        raise MissingCapabilityError(message) from error
    return quantization


def _fake_nvfp4(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Be modelopt's backend: NVFP4 along the last axis with our numerics."""
    amax = getattr(quantizer, "_amax", None)
    largest = x.abs().amax() if amax is None else amax.amax()
    simulated: torch.Tensor = quantize_dequantize(x.float(), largest.float() / (6 * 448))
    return simulated.to(x.dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without modelopt's warnings and progress bars."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def grouped(groups: Sequence[tuple[str, ...]]) -> Iterator[None]:
    """Let modelopt's searches give the layers of each group one format."""
    from modelopt.torch.quantization import algorithms

    owner = {name: group[0] for group in groups for name in group}

    def rule(_model: torch.nn.Module, name: str) -> str | None:
        return owner.get(name)

    searchers = (algorithms.AutoQuantizeGradientSearcher, algorithms.AutoQuantizeKLDivSearcher)
    known = [searcher.quant_grouping_rules for searcher in searchers]
    for searcher, rules in zip(searchers, known, strict=True):
        searcher.quant_grouping_rules = [rule, *rules]
    try:
        yield
    finally:
        for searcher, rules in zip(searchers, known, strict=True):
            searcher.quant_grouping_rules = rules


def _config(format_name: str) -> dict[str, Any]:
    weight, inputs = copy.deepcopy(QUANTIZERS[format_name])
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
            {"quantizer_name": "*input_quantizer", "cfg": inputs, "enable": True},
        ],
        "algorithm": "max",
    }


def search_spaces(
    spaces: Mapping[str, tuple[str, ...]], formats: tuple[str, ...]
) -> dict[str, Any]:
    """The formats of all layers, and an entry for each set of layers that may take fewer."""
    fewer: dict[tuple[str, ...], list[str]] = {}
    for name, allowed in spaces.items():
        if allowed != (FLOAT,) and len(allowed) < len(formats):
            fewer.setdefault(allowed, []).append(glob.escape(name))
    return {
        "quantization_formats": [_config(name) for name in formats],
        "module_search_spaces": [
            {
                "module_name_patterns": patterns,
                "quantization_formats": [_config(name) for name in allowed],
            }
            for allowed, patterns in fewer.items()
        ],
    }


def format_of_recipe(recipe: Any) -> str:
    """Our name for one of its recipes."""
    for entry in recipe.config.quant_cfg:
        cfg = entry.get("cfg")
        if fnmatch.fnmatch("weight_quantizer", entry["quantizer_name"]) and cfg is not None:
            bits = cfg["num_bits"] if isinstance(cfg, Mapping) else cfg.num_bits
            return format_of_bits(bits)
    return FLOAT


def format_of_bits(bits: Any) -> str:
    """Our name for the `num_bits` of a weight quantizer."""
    known = {(2, 1): "nvfp4", (4, 3): "fp8"}
    return "int8" if bits == 8 else known[tuple(bits)]
