"""Videos on a Jetson (Orin: SM 87, Thor: SM 110): its engine is built on the device, once.

    pip install --no-deps vcompress-ai
    pip install numpy av click onnx onnx-ir cuda-bindings     # TensorRT comes with JetPack
    python jetson.py out/ camera.mp4

An artifact with layers that the GPU has no units for is refused with what it has: Orin takes
`--target int8` or `int4`, Thor also fp8, mxfp8 and nvfp4.
"""

import sys
from pathlib import Path

import vcompress
from vcompress.export.engine import own_sm
from vcompress.export.extend import export_runtime


def main(folder: str, video: str, runtime: str = "tensorrt") -> None:
    """Print the answers for `video`, as they come."""
    engines = list(Path(folder).glob(f"model.trt.sm{''.join(own_sm())}.engine"))
    if runtime == "tensorrt" and not engines:
        (sm,) = own_sm() or sys.exit("this device has no NVIDIA GPU; see vcompress doctor")
        made = export_runtime(Path(folder), runtime, sm=sm)
        print(f"built {made.file} with layers in {dict(made.formats)}")

    deployed = vcompress.load_artifact(folder, runtime=runtime)
    error = deployed.check()
    print(f"{deployed.name} on {', '.join(deployed.providers)}, golden clips: {error:.1e}")
    for answer in deployed.windows([video], stride=max(1, deployed.clip.num_frames // 4)):
        print(f"{answer.end_seconds:.2f} s: {answer.label} {answer.score or 0:.1%}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
