"""A GPU machine may have torch, transformers, onnx, safetensors, click, rich and numpy, no more."""

from __future__ import annotations

import subprocess
import sys

MISSING = (
    "av", "diffusers", "ml_dtypes", "modelopt", "onnx_ir", "onnxruntime", "onnxscript", "scipy",
    "tensorrt_rtx",
)  # fmt: skip
PROGRAM = f"""
import importlib.metadata
import sys

class Hidden:
    '''A finder that does not find the missing packages.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
import torch
import vcompress
from vcompress.calib.sources import ClipRequest, open_clip_sets

source = "reference:penvideo20"
model = vcompress.load_model(source)
request = ClipRequest(calib=source, data=None, num_clips=16, num_test_clips=16, seed=0)
clips = open_clip_sets(request, model.clip, model.labels)
options = vcompress.Options(target="nvfp4", calib=source)
plan, smoothing = vcompress.make_plan(model, clips.calibration, options)
planned = vcompress.apply_plan(model, plan, smoothing)
batch = torch.from_numpy(next(clips.test.batches(16)))
assert (planned(batch).argmax(-1) == model(batch).argmax(-1)).float().mean() > 0.9

try:
    vcompress.quantize(source, options=options)
except Exception as error:
    assert type(error).__name__ == "MissingCapabilityError", repr(error)
    assert "pip install" in str(error), error
else:
    raise AssertionError("quantize cannot export here")
print("works")
"""


def test_planning_works_with_little_and_export_says_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "works", done.stderr[-2000:]
