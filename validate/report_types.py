"""The shape of `report.json`, schema 1.

Plain data throughout: what cannot be known is null and says why beside it. Every number has its
unit in its key: `_mib`, `_kib`, `_bytes`, `_ms`, `_seconds`, `_db`, `_percent`, `_points`
(percentage points), `_bits`, `num_` for counts; ratios (`cosine`, `relative_l2`, `score`,
`speed_ratio`) have none. Baseline and result stand side by side.
"""

# No postponed annotations here: with them `NotRequired` is not seen at run time.
from typing import Any, NotRequired, TypedDict

__all__ = [
    "ClipSet", "Clips", "Engine", "FileSize", "Generation", "Layer", "Memory", "Mode", "Model",
    "Precision", "Report", "Sizes", "SkippedClip", "Stage", "Tokens",
]  # fmt: skip


class Model(TypedDict):
    """What was compressed."""

    name: str
    family: str
    task: str
    weights_sha256: str
    num_parameters: int
    num_classes: NotRequired[int | None]


class Mode(TypedDict):
    """A way of calling: "stream" is one clip a call, "batch" several; quantiles as in `latency`."""

    mode: str
    batch_size: int
    num_runs: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    clips_per_second: float


class Memory(TypedDict):
    """Resident memory of a fresh process: before it loads the graph, and at its peak.

    Null where the system does not tell.
    """

    idle_mib: float | None
    peak_mib: float | None


class Stage(TypedDict):
    """One form of the model, from the baseline to the engine, in the order of the chain.

    `metrics` (see `metrics.compare_outputs`) compare with the baseline, `metrics_versus_previous`
    with the stage before, as do `parity`, `ParityResult.as_dict()`, and `agreement` of classifiers,
    `Agreement.as_dict()`; `latency` is `LatencyStatistics.as_dict()`. Where one is null, its
    `_reason` says why. `modes` and `memory` are there where a latency is.
    """

    name: str
    about: str
    runtime: str | None
    metrics: dict[str, Any] | None
    metrics_reason: str | None
    metrics_versus_previous: dict[str, Any] | None
    parity: dict[str, Any] | None
    agreement: NotRequired[dict[str, Any] | None]
    latency: dict[str, Any] | None
    latency_reason: str | None
    batch_size: int | None
    modes: NotRequired[list[Mode] | None]
    memory: NotRequired[Memory | None]


class FileSize(TypedDict):
    """A file of the artifact."""

    path: str
    role: str
    bytes: int


class Sizes(TypedDict):
    """What the weights take, and every file."""

    baseline_weights_mib: float
    result_weights_mib: float
    files: list[FileSize]


class Precision(TypedDict):
    """Bits a parameter, scales counted; `read_back_from` is the file that the formats stand in."""

    baseline_effective_bits: float
    result_effective_bits: float
    read_back_from: str | None


class Layer(TypedDict):
    """One candidate layer of the plan, in model order.

    `score` is the relative error of the enclosing block's output with this layer alone
    quantized. `block` is the full name of the enclosing block, None outside the blocks; without
    the key it is guessed from the name.
    """

    name: str
    format: str
    score: float | None
    reason: str
    weight_kib: float
    block: NotRequired[str | None]


class Search(TypedDict):
    """The search for formats under a budget.

    `points` are (effective bits, predicted loss) of the choices that no other beats in both;
    `bits` and `predicted_loss` are of the one that was taken, `calibration_loss` what it measured.
    """

    loss: str
    points: list[list[float]]
    bits: float
    predicted_loss: float
    calibration_loss: float | None


class TokenBlock(TypedDict):
    """Patch tokens that a block sees; the technique if they were reduced in front of it."""

    block: str
    num_patches: int
    technique: str | None


class Tokens(TypedDict):
    """Token reduction: what the model brings, what is left, and which part of its operations."""

    attention: str
    num_patches_baseline: int
    num_patches_result: int
    flop_share: float
    blocks: list[TokenBlock]


class Generation(TypedDict):
    """What a denoiser does differently from step to step, and the clips that it generates then.

    `psnr_db` is of held-out clips against the full model from the same noise, with all that the
    plan does; `precision_alone_psnr_db` of the same without the cache. `skip_percent` is the share
    of block calls that the cache answers, `speed_ratio` the wall clock without it over that with
    it, in torch. `four_bit_percent` is the share of the work that changes its precision and has
    inputs of four bits. A reason says why there is no cache, or no change of precision, although
    it was asked for.
    """

    num_steps: int | None
    cache_policy: str | None
    cache_reason: str | None
    skip_percent: float | None
    speed_ratio: float | None
    four_bit_percent: float | None
    precision_reason: str | None
    psnr_db: list[float] | None
    precision_alone_psnr_db: list[float] | None
    min_psnr_db: float | None


class Engine(TypedDict):
    """An engine build: status "built", "failed" or "not built"; a reason unless built."""

    runtime: str
    sm: str | None
    status: str
    seconds: float | None
    bytes: int | None
    reason: str | None
    command: NotRequired[str | None]


class ClipSet(TypedDict):
    """A set of clips and its digest."""

    source: str
    num_clips: int
    sha256: str


class SkippedClip(TypedDict):
    """A clip that could not be used."""

    name: str
    reason: str


class Clips(TypedDict):
    """The clips that the result was tested on, those that calibrated it, and those left out."""

    test: ClipSet
    calibration: ClipSet | None
    skipped: list[SkippedClip]


class Report(TypedDict):
    """The whole report.

    `result_stage` names the stage whose numbers are the result; the first stage is the baseline.
    `verdict` is `Verdict.as_dict()`, `device` is `describe_device()` and may say more.
    """

    schema: int
    vcompress: str
    created: str
    command: str
    seed: int
    target: str
    model: Model
    verdict: dict[str, Any]
    result_stage: str
    stages: list[Stage]
    sizes: Sizes
    precision: Precision
    layers: list[Layer]
    tokens: Tokens | None
    search: NotRequired[Search | None]
    generation: NotRequired[Generation | None]
    engines: list[Engine]
    clips: Clips
    device: dict[str, Any]
    versions: dict[str, str]
    warnings: list[str]
