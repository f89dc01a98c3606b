"""Answers of a Triton server on videos.

    vcompress export out/ --to triton -o repository/
    docker run --rm -p 8000:8000 -v $PWD/repository:/models nvcr.io/nvidia/tritonserver:26.09-py3 \
        tritonserver --model-repository /models
    pip install --no-deps vcompress-ai; pip install numpy av 'tritonclient[http]'
    python triton_client.py repository/penvideo20_int8 camera.mp4 door.mp4

The clip is prepared as the manifest in the repository says.
"""

import json
import sys
from pathlib import Path

import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype

from vcompress.calib.decode import read_frames
from vcompress.calib.preprocess import to_model_input
from vcompress.spec.clip import ClipSpec


def main(model: str, *videos: str, url: str = "localhost:8000") -> None:
    """Print the likeliest class of each of `videos`."""
    manifest = json.loads((Path(model) / "manifest.json").read_text(encoding="utf-8"))
    clip = ClipSpec.from_dict(manifest["clip"])
    (given,), (answered, *_) = manifest["inputs"], manifest["outputs"]
    client = triton.InferenceServerClient(url)
    for video in videos:
        value = to_model_input(read_frames(Path(video), clip), clip)[None]
        tensor = triton.InferInput(given["name"], value.shape, np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value)
        wanted = triton.InferRequestedOutput(answered["name"], class_count=1)
        answer = client.infer(Path(model).name, [tensor], outputs=[wanted])
        # "score:index:label", or "score:index" where the artifact has no labels.
        print(video, answer.as_numpy(answered["name"])[0][0].decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
