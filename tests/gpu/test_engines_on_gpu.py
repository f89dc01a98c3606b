"""An engine that is built for the GPU of the machine runs there, and gives the golden outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vcompress
from vcompress.export import engine
from vcompress.export.extend import export_runtime
from vcompress.spec.errors import InputError

RUNTIMES = [each for each in ("tensorrt-rtx", "tensorrt") if engine.library_version(each)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_engine_gives_the_golden_outputs(runtime: str, tmp_path: Path) -> None:
    own = engine.own_sm()
    if not set(own) & set(engine.supported_sms(runtime)):
        pytest.skip(f"{runtime} does not build for SM {own}")
    options = vcompress.Options(target="int8", calib="reference:penvideo20", num_clips=16,
                                output=str(tmp_path / "out"), engine=False)  # fmt: skip
    vcompress.quantize("reference:penvideo20", options=options)
    done = export_runtime(tmp_path / "out", runtime, sm=own[0])
    assert done.golden_relative_l2 is not None
    assert done.kernels
    deployed = vcompress.load_artifact(tmp_path / "out", runtime=runtime)
    assert own[0] in deployed.providers[0]
    inputs = np.random.default_rng(0).normal(size=(3, *deployed.clip.input_shape))
    outputs = deployed.run(inputs.astype(np.float32))
    reference = vcompress.load_artifact(tmp_path / "out").run(inputs.astype(np.float32))
    for name, expected in reference.items():
        assert np.linalg.norm(outputs[name] - expected) < 0.05 * np.linalg.norm(expected)
    with pytest.raises(InputError, match="prepare clips as the manifest says"):
        deployed.run(inputs[:, :, :4].astype(np.float32))
