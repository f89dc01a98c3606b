"""VideoModel: a loaded model and everything that is known of its structure."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from vcompress.models.calls import Batch, Call, run_module
from vcompress.spec.call import CallSpec
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.spec.plan import LayerFacts

__all__ = [
    "Arrangement",
    "Pooling",
    "PrimaryOutput",
    "Task",
    "TokenGrid",
    "VideoModel",
    "primary_output",
    "weights_digest",
]

Task = Literal["classify", "embed", "detect", "denoise", "restore", "generic"]
Pooling = Literal["mean", "class_token", "attention"]
Arrangement = Literal["joint", "frames", "tubes", "divided"]


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """The token sequence of a video transformer.

    `frames` x `height` x `width` patches in raster order stand after `special` leading tokens
    (class token, registers) that no technique may touch.

    Shapes: B clips, T frames, L = height x width places, S special tokens, C width.

    Attributes:
        arrangement: what a block takes.
            joint: `[B, S + T L, C]`, attention over all.
            frames: `[B T, S + L, C]`, each frame for itself to the end (image towers).
            tubes: `[B T, S + L, C]`, but what follows needs the same places in all frames
                (factorised encoders).
            divided: `[B, S + L T, C]`, places first, attention in turn over time and space.
        stem: the name under which the blocks stand that take this; empty for all blocks.
        readers: full names of the modules after the blocks that attend to all of their tokens.
        rotary: positions are computed in every attention, so they have to be carried along.
    """

    frames: int
    height: int
    width: int
    special: int = 0
    arrangement: Arrangement = "joint"
    stem: str = ""
    readers: tuple[str, ...] = ()
    rotary: bool = False

    @property
    def num_patches(self) -> int:
        """Patch tokens of a clip, special tokens not counted."""
        return self.frames * self.height * self.width


def primary_output(output: Any) -> torch.Tensor:
    """The tensor that a model is judged by: its logits, or the first tensor that it returns."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "sample", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    values = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(values, list | tuple) or not values:
        message = (
            f"the model must return a tensor, or a sequence or mapping that begins with one, got "
            f"{type(output).__name__}; wrap it in a module that does"
        )
        raise InputError(message)
    return primary_output(values[0])


class PrimaryOutput(nn.Module):
    """`model` reduced to one input, one tensor out: what is exported and compared.

    The input is a tensor of clips, or the tensors of `Call.flat` by name; the constants of such a
    call are those of `example`.
    """

    def __init__(self, model: nn.Module, example: Batch | None = None) -> None:
        super().__init__()
        self.model = model
        self._call = example if isinstance(example, Call) else None

    def forward(self, clips: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Clips `[B, *clip.input_shape]`, or named tensors, to the primary output."""
        if isinstance(clips, torch.Tensor):
            return primary_output(self.model(clips))
        assert self._call is not None, "named tensors need the example that they belong to"
        return primary_output(run_module(self.model, self._call.with_flat(clips)))


def weights_digest(module: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of all tensors of `module`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class VideoModel:
    """A trained model, ready to be looked at and compressed.

    Attributes:
        name: for file names and tables.
        module: in evaluation mode; takes what `inputs` describes.
        family: the adapter that knows it, or "generic".
        task: what its output means.
        inputs: how a video becomes its input, or which named tensors it takes.
        layers: every linear and convolution that ran, by full name, in the order of the module.
        blocks: full names of the repeated blocks, in order.
        token_grid: of its token sequence, where known.
        pooling: how the tokens become one vector ("mean" of all, the "class_token", or by
            "attention" of the grid's readers), where known.
        labels: class names, possibly empty.
        config: what the family's configuration says; recorded in the artifact.
        source: where it came from, for the manifest.
        call: one call of a model that takes named tensors; None for a model of clips.
    """

    name: str
    module: nn.Module
    family: str
    task: Task
    inputs: ClipSpec | CallSpec
    layers: Mapping[str, LayerFacts]
    blocks: tuple[str, ...]
    token_grid: TokenGrid | None = None
    pooling: Pooling | None = None
    labels: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    weights_sha256: str = ""
    call: Call | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The primary output for clips `[B, *clip.input_shape]` or a call, without gradients."""
        with torch.inference_mode():
            return primary_output(run_module(self.module, batch))

    @property
    def clip(self) -> ClipSpec:
        """How a video becomes the input.

        Raises:
            InputError: the model takes no clips.
        """
        if isinstance(self.inputs, ClipSpec):
            return self.inputs
        message = (
            f"{self.name} takes no clips but {self.inputs}; this works for models of clips alone"
        )
        raise InputError(message)

    def layer(self, name: str) -> nn.Module:
        """The module behind a full name."""
        return self.module.get_submodule(name)

    def copy(self) -> VideoModel:
        """A deep copy whose module may be changed."""
        return replace(self, module=copy.deepcopy(self.module))

    def example(self, batch_size: int = 1, seed: int = 0) -> Batch:
        """Input of the right shapes and types; only for structure, export and timing.

        Random clips, or the model's one call, whose numbers may stand for something.
        """
        if self.call is not None:
            return self.call.repeated(batch_size)
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, *self.clip.input_shape)
        if self.clip.dtype == "uint8":
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return torch.randn(shape, generator=generator)

    @property
    def token_blocks(self) -> tuple[str, ...]:
        """The blocks that take the token grid, in order; none if there is no grid."""
        if self.token_grid is None:
            return ()
        stem = f"{self.token_grid.stem}." if self.token_grid.stem else ""
        return tuple(block for block in self.blocks if block.startswith(stem))

    def block_of(self, layer: str) -> str | None:
        """The repeated block that encloses `layer`, or None."""
        for block in self.blocks:
            if layer.startswith(f"{block}."):
                return block
        return None
