from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from vcompress.export.capabilities import Gpu, _runs_engine, _target, capabilities
from vcompress.export.engine import supported_sms
from vcompress.export.runtime import available_providers
from vcompress.spec.target import TARGETS

BLACKWELL = Gpu(name="RTX 5090", sm="120", memory_gib=32)
HOPPER = Gpu(name="H200", sm="90", memory_gib=139)
ADA = Gpu(name="RTX 4090", sm="89", memory_gib=24)


def test_every_line_is_a_fact_of_this_machine() -> None:
    found = {capability.name: capability for capability in capabilities()}
    assert all(capability.detail for capability in found.values())
    assert all(capability.remedy for capability in found.values() if capability.status != "works")

    assert found["torch"].detail.startswith(metadata.version("torch"))
    assert all(provider in found["onnxruntime"].detail for provider in available_providers())
    assert f"builds for SM {', '.join(supported_sms())}" in found["tensorrt-rtx"].detail
    assert found["modelopt"].detail == metadata.version("nvidia-modelopt")
    assert "h264" in found["av"].detail
    assert [f"target {name}" for name in TARGETS] == list(found)[-len(TARGETS) :]
    assert found["target int8"].status == "works"
    assert set(found["gpu"].as_dict()) == {"name", "status", "detail", "remedy"}


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [
        (BLACKWELL, {"nvfp4", "fp8", "int8"}),
        (ADA, {"fp8", "int8"}),
        # TensorRT-RTX has no engines for data-center GPUs; the enterprise TensorRT has.
        (HOPPER, set()),
    ],
    ids=lambda value: value.name if isinstance(value, Gpu) else "",
)
def test_a_target_works_where_its_format_has_tensor_cores_and_a_runtime(
    gpu: Gpu, runs: set[str]
) -> None:
    sms = supported_sms("tensorrt-rtx")
    assert {form for form in TARGETS if _runs_engine(gpu, form, sms)} == runs


def test_a_target_without_its_hardware_is_simulated() -> None:
    without = _target(TARGETS["nvfp4"], ())
    assert without.status == "simulated"
    assert "builds: ONNX, engine for SM 120; runs on: nothing here" in without.detail
    assert "Blackwell" in without.remedy
    there = _target(TARGETS["nvfp4"], (BLACKWELL,))
    assert (there.status, there.remedy) == ("works", "")


def test_importing_the_module_is_quick() -> None:
    code = "import sys, vcompress.export.capabilities; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
