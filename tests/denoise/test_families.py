"""Every family quantized, cached and run by the pipeline that diffusers has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vcompress.benchmarks.denoiser_pipelines import PIPELINES, STEPS, open_pipeline
from vcompress.benchmarks.denoiser_zoo import artifact_of
from vcompress.compress.frozen import FrozenLayer
from vcompress.pipeline.cache import cached
from vcompress.pipeline.compressed import compressed
from vcompress.spec.cache_section import CacheSection

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*In CPU autocast"),
    pytest.mark.filterwarnings("ignore:CPU Autocast only supports"),
]
# Every third step is computed, and the last.
SECTION = CacheSection(policy="taylorseer", interval=3, num_steps=STEPS)


@pytest.fixture(scope="module")
def artifacts(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders with an NVFP4 artifact of a class, written once."""
    root = tmp_path_factory.mktemp("artifacts")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            artifact_of(zoo.load(kind), zoo.calls(kind), "nvfp4", root / kind, cache=SECTION)
        return root / kind

    return folder


def put(run: Any, folder: Path) -> Any:
    """The artifact in the place of every denoiser, with one cache for the run."""
    pipe = run.pipe
    pipe.transformer = compressed(folder)
    if getattr(pipe, "transformer_2", None) is not None:
        pipe.transformer_2 = compressed(folder)
    return cached(pipe, folder)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_family_runs_quantized_and_cached(artifacts: Any, family: str) -> None:
    run = open_pipeline(family)
    original = run()
    folder = artifacts(PIPELINES[family][0])
    with put(run, folder) as handle:
        frozen = [each for each in run.pipe.transformer.modules() if isinstance(each, FrozenLayer)]
        assert len(frozen) >= 10
        clip = run()
        report = handle.report()
        assert clip.shape == original.shape
        assert clip.isfinite().all()
        # Six of ten steps are reused, in Wan 2.2 one less at the change of denoisers.
        assert 0.3 < report.skip_rate < 0.6
        assert report.num_generations == 1
        assert (report.consulted.sum(axis=1) > 0).all()
        # Requests follow each other: a larger clip of another seed, one that is stopped.
        larger = "height" if run.call["height"] < 64 else "width"
        run(seed=2, **{larger: 2 * run.call[larger]})
        with pytest.raises(RuntimeError, match="the user left"):
            run(seed=3, **_stopped_at(run, 5))
        assert torch.equal(run(), clip)
    uncached = run()
    assert not torch.equal(uncached, clip)
    # What the cache changes is less than what is there.
    assert (uncached - clip).norm() < 0.5 * uncached.norm()


def test_requests_that_differ_in_one_thing_are_kept_apart(artifacts: Any) -> None:
    run = open_pipeline("Wan 2.1")
    other = {name: value.flip(1) for name, value in run.call.items() if "embeds" in name}
    requests: dict[str, dict[str, Any]] = {
        "same": {}, "other text": other, "guidance": {"guidance_scale": 2.0},
        "no guidance": {"guidance_scale": 1.0}, "frames": {"num_frames": 9},
        "steps": {"num_inference_steps": STEPS + 3}, "two": {"num_videos_per_prompt": 2},
    }  # fmt: skip
    alone = {}
    for name, changed in requests.items():
        with put(run, artifacts(PIPELINES["Wan 2.1"][0])):
            alone[name] = run(**changed)
    with put(run, artifacts(PIPELINES["Wan 2.1"][0])) as handle:
        for name in ("same", "other text", "guidance", "same", "no guidance", "two", "frames",
                     "steps", "same"):  # fmt: skip
            assert torch.equal(run(**requests[name]), alone[name]), name
    assert handle.report().num_generations == 9


def _stopped_at(run: Any, step: int) -> dict[str, Any]:
    """Arguments of a request whose user leaves at `step`."""

    def leave(_pipe: Any, at: int, _timestep: Any, tensors: Any) -> Any:
        if at == step:
            message = "the user left"
            raise RuntimeError(message)
        return tensors

    return {"callback_on_step_end": leave}
