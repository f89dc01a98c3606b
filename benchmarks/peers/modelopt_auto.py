"""The peer: modelopt's `auto_quantize`, given our formats, our layers and the same clips, on a CPU.

What it does, read in `modelopt/torch/quantization/algorithms.py` of version 0.47:

- Phases: calibrate each format on `num_calib_steps` batches ("max"), score each layer and format on
  `num_score_steps` batches, solve. Defaults of the signature, which its documentation suggests:
  512 and 128 batches. A shorter loader ends a phase early; here it starts again, so that the
  number of steps is what was asked for.
- Effective bits: weights only. A layer costs its number of weights times the bits of its format,
  over all searched layers: nvfp4 4.5 (the library's own figure, block scales counted), fp8 8, int8
  8 (channel scales not counted), unquantized 16. Inputs, biases and norms cost nothing. Without the
  `effective_bits` that its NVFP4 presets carry, a format costs its element bits.
- "gradient" (default): score = sum over elements of (dloss/dy * (y_quantized - y))^2 at a layer's
  output y, one forward and backward a batch, each layer run once more for each format. Then an
  integer program (CBC). "kl_div": the KL of the whole model's output with one layer in one format,
  by brute force, then a bisection on one threshold for all layers: each layer takes its smallest
  format with a score below it.
- Scores are made monotone: a format is never worse than the one before it in order of bits. int8
  and fp8 have the same 8 bits; the one that sorts later gets the smaller score of both, so that the
  choice between the two is partly arbitrary.
- Layers: every nn.Linear and convolution that it can convert, Conv3d and ConvTranspose included.
  The name patterns by which its presets leave layers out (`*lm_head*`, `*proj_out.*`, `*visual*`)
  are not looked at in a search: a format is matched to each layer without its path. The output
  layer is searched like any other. A disabled layer still costs 16 bits a weight, unless its name
  is in `cost.excluded_module_name_patterns`.
- Groups that share a format go by name: `q_proj`/`k_proj`/`v_proj`, `gate_proj`/`up_proj`, experts.
  `query`/`key`/`value` (VideoMAE, our DINOv2) are not grouped, unless `groups` says so here.
- NVFP4 of Conv3d runs a CUDA kernel only. NVFP4 elsewhere has a simulation for GPUs only, which our
  backend replaces (`register_quant_backend`).

What is done here for a fair comparison: each layer searches exactly the formats that vcompress
allows it (`module_search_spaces`); whatever vcompress does not count as a layer is disabled and
left out of the cost; layers without any format count at 16 bits in both.

The loss. At the uncompressed model the gradient of KL or of a squared error to its own output is
zero, so neither can score a layer by "gradient". A model with labels gets their cross entropy,
which is what modelopt's documentation shows. Every other gets the linear loss whose gradient is a
random probe (`compress.losses`): its expected square is the curvature of the loss that vcompress
minimises. For "kl_div" an output y without classes becomes pairs of logits (u, -u) with
u = (y - y0) / rms(y0), y0 being the uncompressed output: their KL, log cosh u, is the squared
relative error, up to a constant and terms of higher order. modelopt computes it in float32, so that
errors below 1e-4 drown in rounding.

Seconds are those of the processor, all threads together: other work on the machine counts less.

A model that overwrites what its backward pass needs (TransNetV2: `x += shortcut` behind a ReLU)
ends modelopt's "gradient" with a RuntimeError; such a model is run here under torch's
`allow_mutation_on_saved_tensors`. `seconds` leaves out the import, the uncompressed outputs and
this check.
"""

from __future__ import annotations

import contextlib
import glob
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vcompress.benchmarks.peers.modelopt_setup import (
    BITS,
    QUANTIZERS,
    Loader,
    Loss,
    Method,
    Steps,
    format_of_bits,
    format_of_recipe,
    grouped,
    modelopt,
    quiet,
    search_spaces,
)
from vcompress.calib.clips import Clips
from vcompress.models.video import VideoModel, primary_output
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT

__all__ = ["DEFAULT_CALIB_STEPS", "DEFAULT_SCORE_STEPS", "PeerPlan", "search"]

DEFAULT_CALIB_STEPS = 512
DEFAULT_SCORE_STEPS = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class PeerPlan:
    """What modelopt chose.

    Attributes:
        formats: layer -> format or "keep", for every layer of the model.
        effective_bits_their_count: weights only, 16 for kept ones; see the module.
        satisfied: whether the choice meets the bound; its bisection ("kl_div") may miss it.
        seconds: of calibration, scores and solution of this bound; the further bounds of one
            `search` reuse calibration and scores, as modelopt itself does.
        scores: layer -> format -> score, after modelopt made them monotone.
    """

    formats: Mapping[str, str]
    effective_bits_their_count: float
    satisfied: bool
    seconds: float
    scores: Mapping[str, Mapping[str, float]]


def search(
    model: VideoModel, clips: Clips, effective_bits: float | Sequence[float], *,
    formats: tuple[str, ...] = ("nvfp4", "int8", "fp8"), method: Method = "gradient",
    num_calib_steps: int = DEFAULT_CALIB_STEPS, num_score_steps: int = DEFAULT_SCORE_STEPS,
    batch_size: int = 1, loss: Loss | None = None, seed: int = 0,
    groups: Sequence[tuple[str, ...]] = (),
) -> list[PeerPlan]:  # fmt: skip
    """Run `auto_quantize` once on a copy of `model`; one plan for each bound.

    Args:
        model: not changed.
        clips: for calibration and scores, used again from the start where steps exceed them.
        effective_bits: upper bound or bounds, in modelopt's count.
        formats: what it may choose from, besides keeping a layer.
        method: modelopt's name for how scores are measured and the plan is solved.
        num_calib_steps, num_score_steps: batches.
        batch_size: clips a batch.
        loss: of "gradient"; by default "labels" where a classifier's clips have them, else
            "probe".
        seed: of the probes.
        groups: layers that share a format, besides those that modelopt finds by name.

    Raises:
        InputError: a bound that no choice of these formats can meet.
        MissingCapabilityError: modelopt is not installed.
    """
    quantization = modelopt()
    bounds = [effective_bits] if isinstance(effective_bits, int | float) else list(effective_bits)
    subject = model.copy()
    spaces = _allowed_formats(model, formats)
    least = _effective_bits(model, {layer: own[0] for layer, own in spaces.items()})
    if min(bounds) < least - 1e-9:
        message = (
            f"effective bits must be at least {least:.3f} for {model.name} with "
            f"{', '.join(formats)}, got {min(bounds):g}; raise the bound"
        )
        raise InputError(message)
    if loss is None:
        has_labels = model.task == "classify" and clips.labels is not None
        loss = "labels" if has_labels else "probe"
    steps = Steps(model, method, loss, seed)
    outside = _other_modules(subject)
    loader = Loader(model, clips, batch_size, max(num_calib_steps, num_score_steps))
    none = [glob.escape(name) for name, own in spaces.items() if own == (FLOAT,)]
    needs_copies = method == "gradient" and _works_in_place(model, next(iter(loader)).clips[:1])
    start = time.process_time()
    with quiet(), grouped(groups), contextlib.ExitStack() as stack:
        if method == "gradient":
            stack.enter_context(torch.enable_grad())
        if needs_copies:
            # It takes time, so models that do without it are searched without it.
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        _, state = quantization.auto_quantize(
            subject.module,
            constraints={
                "effective_bits": bounds[0],
                "cost": {"excluded_module_name_patterns": outside},
            },
            data_loader=loader,
            forward_step=steps.forward,
            loss_func=steps.loss if method == "gradient" else None,
            disabled_layers=[*outside, *none],
            num_calib_steps=num_calib_steps,
            num_score_steps=num_score_steps,
            method=method,
            **search_spaces(spaces, formats),
        )
    shared = time.process_time() - start
    plans = [_plan(model, state, bounds[0], None, shared)]
    for bound in bounds[1:]:
        start = time.process_time()
        with quiet():
            config = quantization.get_auto_quantize_config(state, {"effective_bits": bound})
        seconds = shared + time.process_time() - start
        plans.append(_plan(model, state, bound, config, seconds))
    return plans


def _works_in_place(model: VideoModel, clips: torch.Tensor) -> bool:
    """Whether the model overwrites what its backward pass needs, as TransNetV2 does."""
    subject = model.copy().module.requires_grad_(True)
    with torch.enable_grad():
        try:
            primary_output(subject(clips)).sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            return True
    return False


def _allowed_formats(model: VideoModel, formats: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Layer -> its formats, fewest bits first; ("keep",) where it has none."""
    unknown = set(formats) - set(QUANTIZERS)
    if unknown:
        message = f"formats must be among {', '.join(QUANTIZERS)}, got {', '.join(unknown)}"
        raise InputError(message)
    ordered = sorted(formats, key=BITS.__getitem__)
    return {
        name: tuple(f for f in ordered if facts.objection(f) is None) or (FLOAT,)
        for name, facts in model.layers.items()
    }


def _other_modules(model: VideoModel) -> list[str]:
    """Escaped names of modules that modelopt would search and vcompress does not know as layers."""
    return [
        glob.escape(name)
        for name, module in model.module.named_modules()
        if name not in model.layers
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and module.weight.ndim >= 2
    ]


def _effective_bits(model: VideoModel, formats: Mapping[str, str]) -> float:
    """In modelopt's count, over the layers that vcompress knows."""
    sizes = {name: torch.Size(facts.weight_shape).numel() for name, facts in model.layers.items()}
    bits = sum(size * BITS[formats[name]] for name, size in sizes.items())
    return bits / sum(sizes.values())


def _plan(
    model: VideoModel, state: Mapping[str, Any], bound: float, config: Any, seconds: float
) -> PeerPlan:
    """Read a choice: of the search itself, or of the `config` of a further bound."""
    formats = dict.fromkeys(model.layers, FLOAT)
    scores: dict[str, dict[str, float]] = {}
    for key, statistics in state["candidate_stats"].items():
        for name in statistics["module_names"]:
            if name in formats:
                scores[name] = {
                    format_of_recipe(recipe): score
                    for recipe, score in zip(
                        statistics["formats"], statistics["scores"], strict=True
                    )
                }
                if config is None:
                    formats[name] = format_of_recipe(state["best"]["recipe"][key])
    for entry in config["quant_cfg"] if config is not None else ():
        name, _, quantizer = entry["quantizer_name"].rpartition(".")
        if quantizer == "weight_quantizer" and entry.get("enable") and name in formats:
            formats[name] = format_of_bits(entry["cfg"]["num_bits"])
    count = _effective_bits(model, formats)
    if config is None:
        theirs = state["best"]["constraints"]["effective_bits"]
        assert abs(theirs - count) < 1e-6, f"modelopt counts {theirs} bits, we count {count}"
    return PeerPlan(
        formats=formats,
        effective_bits_their_count=count,
        satisfied=count <= bound + 1e-9,
        seconds=seconds,
        scores=scores,
    )
