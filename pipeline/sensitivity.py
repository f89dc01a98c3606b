"""What each layer costs in each format: predicted in seconds, measured where asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vcompress.calib.calls import Samples
from vcompress.calib.observe import observe
from vcompress.compress.agreement import Agreement, compare_sensitivities
from vcompress.compress.brute_force import measure_losses, reference_outputs
from vcompress.compress.clip_choice import batches_of
from vcompress.compress.mixed import NUM_PREDICTION_CLIPS
from vcompress.compress.precision_search import PrecisionSearch
from vcompress.compress.sensitivities import freeze_candidates, predict_sensitivities
from vcompress.models.load import LoadOptions
from vcompress.models.video import VideoModel
from vcompress.pipeline.order import open_model_and_clips
from vcompress.pipeline.run import Options, Progress, Recorded, Silent
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.files import check_file
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.strict_json import nearest
from vcompress.spec.target import find_target
from vcompress.validate.sensitivity_plot import plot_sensitivities

__all__ = ["SensitivityTable", "measure_sensitivity", "sensitivity"]

_REGRET_BITS = 5.5
_REGRET_MARGIN_BITS = 0.5


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """Losses by layer and format.

    Attributes:
        model: its name.
        loss: in which the costs are, see `compress.losses`.
        kinds: layer -> kind.
        predicted: layer -> format -> loss with this layer alone in this format. Empty for layers
            that can have none of the formats.
        measured: the same by brute force, where asked for.
        agreement: of the two.
        unreached: layers that the clips did not reach, or not those for the prediction.
        seconds: wall time of calibration, prediction and brute force.
    """

    model: str
    loss: str
    kinds: Mapping[str, str]
    predicted: Mapping[str, Mapping[str, float]]
    measured: Mapping[str, Mapping[str, float]] | None
    agreement: Agreement | None
    unreached: tuple[str, ...]
    num_clips: Mapping[str, int]
    seconds: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None where a loss is not finite."""
        plain: dict[str, Any] = _finite(asdict(self))
        return {"schema": 1, "command": "sensitivity", **plain}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sensitivity(
    source: str | VideoModel, *, options: Options, formats: tuple[str, ...] | None = None,
    check: bool = False, plot: Path | None = None, load: LoadOptions | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:  # fmt: skip
    """Predict what each layer costs in each format.

    Args:
        formats: instead of those of `options.target`.
        check: measure the same by brute force, and compare.
        plot: PNG to draw the predictions into; without matplotlib there is a warning instead.

    Raises:
        InputError: the model, the clips or a format is wrong.
    """
    recorded = Recorded(progress or Silent())
    wanted = _wanted(formats, options.target)
    if plot is not None:
        check_file(plot)
    model, clips = open_model_and_clips(source, options, load, recorded)
    table = measure_sensitivity(
        model, clips.calibration, wanted, check=check, seed=options.seed, progress=recorded
    )
    if plot is not None:
        _draw(model.name, table.loss, table.predicted, plot, recorded)
    return table


def measure_sensitivity(
    model: VideoModel, calibration: Samples, formats: tuple[str, ...], *, check: bool, seed: int,
    progress: Progress,
) -> SensitivityTable:  # fmt: skip
    """`sensitivity`, for a model and clips that are open already.

    Args:
        formats: names in `spec.formats.FORMATS`.
        check: measure the same by brute force, and compare.
    """
    started = time.perf_counter()
    layers = {name: model.layer(name) for name in model.layers}
    with progress.stage("calibrate", len(calibration)) as advance:
        stats = observe(
            model, layers, calibration, needs=frozenset({"input_amax", "outputs"}),
            on_batch=advance,
        )  # fmt: skip
    calibrated = time.perf_counter()
    with progress.stage("predict", NUM_PREDICTION_CLIPS) as advance:
        candidates = freeze_candidates(model, formats, stats.input_amax)
        found = predict_sensitivities(
            model, candidates, calibration, num_clips=NUM_PREDICTION_CLIPS,
            outputs=stats.outputs, seed=seed, on_batch=advance,
        )  # fmt: skip
        predicted = {
            layer: {name: loss for name in frozen if (loss := found.of(layer, name)) is not None}
            for layer, frozen in candidates.items()
        }
    seconds = {"calibrate": calibrated - started, "predict": time.perf_counter() - calibrated}
    measured, agreement = None, None
    if check:
        batches = batches_of(calibration, len(calibration))
        begun = time.perf_counter()
        with progress.stage("brute force", sum(map(len, candidates.values()))) as advance:
            measured = measure_losses(
                model, candidates, batches, reference_outputs(model, batches), found.loss,
                on_pair=advance,
            )  # fmt: skip
        seconds["brute_force"] = time.perf_counter() - begun
        search = PrecisionSearch(model, candidates, found)
        agreement = compare_sensitivities(
            predicted, measured, search.groups, search.num_weights, _regret_bits(search)
        )
    return SensitivityTable(
        model=model.name,
        loss=found.loss.name,
        kinds={name: model.layers[name].kind for name in predicted},
        predicted=predicted,
        measured=measured,
        agreement=agreement,
        unreached=tuple(
            name
            for name in model.layers
            if name not in candidates or (candidates[name] and not predicted[name])
        ),
        num_clips={"calibration": len(calibration), "prediction": found.num_clips},
        seconds=seconds,
    )


def _regret_bits(search: PrecisionSearch) -> float:
    """Where plans are compared: some layers can have more than their fewest bits there."""
    fewest = search.fewest_bits / max(1, search.num_weights)
    return max(_REGRET_BITS, round(fewest + _REGRET_MARGIN_BITS, 2))


def _wanted(formats: tuple[str, ...] | None, target: str) -> tuple[str, ...]:
    if formats is None:
        return tuple(name for name in find_target(target).formats if name != FLOAT)
    for name in formats:
        if name not in FORMATS:
            message = (
                f"unknown format {name!r}{nearest(name, FORMATS)}; choose from: "
                f"{', '.join(FORMATS)}"
            )
            raise InputError(message)
    return formats


def _draw(
    name: str, loss: str, predicted: Mapping[str, Mapping[str, float]], path: Path,
    progress: Progress,
) -> None:  # fmt: skip
    try:
        plot_sensitivities(predicted, loss, f"{name}: sensitivity of each layer", path)
    except MissingCapabilityError as error:
        progress.warn(str(error))
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror or error}; choose another --output"
        raise InputError(message) from error
