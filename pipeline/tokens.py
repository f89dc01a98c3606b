"""`vcompress tokens`: find a token schedule under one bar, and write it as a plan."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vcompress.calib.calls import Samples
from vcompress.compress.tensors import TOKENS, ModelTensors
from vcompress.compress.tokens.decide import (
    refused_techniques,
    too_few_clips,
    trials_on,
    with_readout,
)
from vcompress.compress.tokens.flops import counts_of
from vcompress.compress.tokens.rules import objection
from vcompress.compress.tokens.search import Found, TokenSearch
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.load import LoadOptions
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.order import check_plan_output, open_model_and_clips
from vcompress.pipeline.planning import empty_plan, save_plan
from vcompress.pipeline.run import Options, Progress, Recorded, Silent
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.layer_choice import LayerChoice
from vcompress.spec.token_section import TokenSection
from vcompress.validate.latency import measure_interleaved

__all__ = ["TokenSchedule", "find_tokens"]

_LATENCY_STEPS = 4
# A schedule this little under the limit is not worth another step.
_LATENCY_SLACK = 0.97
_WARM_UP, _ROUNDS, _MIN_SECONDS = 2, 6, 1.0


@dataclass(frozen=True, kw_only=True)
class TokenSchedule:
    """A schedule and what it was measured to cost.

    Attributes:
        model: its name.
        section: the schedule.
        blocks: block -> patch tokens that it sees.
        flop_share: operations of the blocks and the embedding, as a share of those of the model.
        loss: in which `loss_value` is, see `compress.losses`.
        changed_points: calibration clips in a hundred whose top class is another one.
        latency_share: wall-clock time as a share of the model's, in ONNX Runtime here; None where
            it was not asked for.
        num_clips: that the search saw.
        num_measured: schedules that were run.
        refused: techniques that the model cannot take, and why.
    """

    model: str
    section: TokenSection
    blocks: Mapping[str, int]
    flop_share: float
    loss: str
    loss_value: float
    changed_points: float
    latency_share: float | None
    num_clips: int
    num_measured: int
    refused: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {**asdict(self), "section": self.section.as_dict()}
        return {"schema": 1, "command": "tokens", **plain}


def find_tokens(
    source: str | VideoModel, path: Path, *, options: Options, max_flops: float | None = None,
    max_latency: float | None = None, load: LoadOptions | None = None,
    progress: Progress | None = None,
) -> TokenSchedule:  # fmt: skip
    """Find the schedule of least loss under one bar, and write it to `path` as a plan.

    The plan keeps every layer as it is: apply it alone, or hand it to `quantize` as `tokens`.

    Args:
        source: the model.
        path: of the plan.
        options: clips and seed; `max_drop` or `min_sqnr` may be the bar.
        max_flops: the bar, operations as a share of the model's.
        max_latency: the bar, wall-clock time as a share of the model's.

    Raises:
        InputError: not exactly one bar; the model takes no reduction; no schedule holds the bar;
            `path` cannot be written.
    """
    recorded = Recorded(progress or Silent())
    bars = {
        "--max-drop": options.max_drop, "--min-sqnr": options.min_sqnr,
        "--max-flops": max_flops, "--max-latency": max_latency,
    }  # fmt: skip
    given = [name for name, value in bars.items() if value is not None]
    if len(given) != 1:
        message = f"give exactly one of {', '.join(bars)}; got {', '.join(given) or 'none'}"
        raise InputError(message)
    check_plan_output(path, force=options.force)
    model, clips = open_model_and_clips(source, options, load, recorded)
    reason = objection(model)
    if reason is not None:
        message = f"tokens cannot be reduced: {reason}"
        raise InputError(message)
    with recorded.stage("search"):
        trials = trials_on(model, clips.calibration, options.seed)
        if options.max_drop is not None:
            coarse = too_few_clips(Budget("drop_points", options.max_drop), trials.num_clips)
            if coarse is not None:
                recorded.warn(coarse)
        search = TokenSearch(trials)
        found, latency = _found(search, model, options, max_flops, max_latency)
        decided = with_readout(model, found.section, clips.calibration, options.seed)
    assert decided.section is not None
    tensors = {TOKENS: decided.tensors} if decided.tensors else {}
    evidence = {"flop_share": found.flop_share}
    _write(model, clips.calibration, options, decided.section, tensors, evidence, path)
    counts = counts_of(found.section, model.token_blocks)
    return TokenSchedule(
        model=model.name,
        section=decided.section,
        blocks=dict(zip(model.token_blocks, counts, strict=True)),
        flop_share=found.flop_share,
        loss=trials.loss.name,
        loss_value=found.measured.loss,
        changed_points=found.measured.changed_points,
        latency_share=latency,
        num_clips=trials.num_clips,
        num_measured=trials.num_measured,
        refused=refused_techniques(model),
    )


def _found(
    search: TokenSearch, model: VideoModel, options: Options, max_flops: float | None,
    max_latency: float | None,
) -> tuple[Found, float | None]:  # fmt: skip
    if max_flops is not None:
        return search.at_share(max_flops), None
    if max_latency is not None:
        return _within_latency(search, model, max_latency)
    if options.max_drop is not None:
        if model.task != "classify":
            message = (
                f"--max-drop is a bar for top-1, but the task of {model.name} is {model.task}; "
                "use --min-sqnr or --max-flops"
            )
            raise InputError(message)
        budget = Budget("drop_points", options.max_drop)
    else:
        assert options.min_sqnr is not None
        if model.task == "classify":
            message = (
                f"--min-sqnr is a bar for outputs, but {model.name} classifies; use --max-drop or "
                "--max-flops"
            )
            raise InputError(message)
        budget = Budget("sqnr_db", options.min_sqnr)
    found = search.within(budget)
    if found is None:
        message = (
            f"no token schedule holds {budget.kind.replace('_', ' ')} {budget.limit:g} on the "
            "calibration clips; ask for less, or leave tokens alone"
        )
        raise InputError(message)
    return found, None


def _within_latency(search: TokenSearch, model: VideoModel, limit: float) -> tuple[Found, float]:
    """The schedule whose measured time is closest under `limit`: operations are only a guess."""
    share, held = limit, None
    for _ in range(_LATENCY_STEPS):
        found = search.at_share(share)
        latency = latency_share(model, found.section, search.fitted(found.section))
        if latency <= limit and (held is None or latency > held[1]):
            held = (found, latency)
        if _LATENCY_SLACK * limit <= latency <= limit:
            break
        # Time grows nearly in proportion to operations; what does not grow is what we correct.
        share = min(1.0, max(0.02, share * limit / latency * 0.99))
    if held is None:
        message = (
            f"no token schedule of {model.name} runs in {limit:g} of its time here; ask for more"
        )
        raise InputError(message)
    return held


def latency_share(
    model: VideoModel, section: TokenSection,
    tensors: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> float:  # fmt: skip
    """Wall-clock time of the reduced model over that of the model, one clip, interleaved.

    Args:
        model: without reduction.
        section: to time.
        tensors: of its fitted techniques.
    """
    from vcompress.export.graph import export_onnx
    from vcompress.export.runtime import open_session

    reduced = model.copy()
    apply_reduction(reduced, section, tensors)
    clip = model.example()
    assert isinstance(clip, torch.Tensor), "models with a grid of tokens take clips"
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, module in (("model", model.module), ("reduced", reduced.module)):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(PrimaryOutput(module), clip, path, dialect="portable", dynamic_batch=False)
            sessions[name] = open_session(path, threads=torch.get_num_threads())
        data = clip.numpy()
        runners = {name: partial(session.run, data) for name, session in sessions.items()}
        timed = measure_interleaved(
            runners, warm_up=_WARM_UP, rounds=_ROUNDS, min_seconds=_MIN_SECONDS
        )
    speed = timed["reduced"].speed
    assert speed is not None
    return 1 / speed.median


def _write(
    model: VideoModel, calibration: Samples, options: Options, section: TokenSection,
    tensors: ModelTensors, evidence: Mapping[str, Any], path: Path,
) -> None:  # fmt: skip
    plan = empty_plan(model, calibration, options)
    kept = LayerChoice(format=FLOAT, reason="only tokens are reduced")
    plan = replace(
        plan,
        tokens=section,
        quantize=dict.fromkeys(model.layers, kept),
        evidence={**plan.evidence, "tokens": evidence},
    )
    save_plan(plan, tensors, path)
