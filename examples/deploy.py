"""Answers an artifact's model gives on videos, on a device without torch.

    pip install --no-deps vcompress-ai
    pip install numpy av click onnxruntime     # or openvino
    python deploy.py out/ camera.mp4 door.mp4

It first runs the artifact's golden clips: a device that computes something else stops here.
"""

import sys

import vcompress


def main(folder: str, *videos: str) -> None:
    """Print the answers for `videos`, as they come."""
    deployed = vcompress.load_artifact(folder)
    print(
        f"{deployed.name} on {', '.join(deployed.providers)}, golden clips: {deployed.check():.1e}"
    )

    # A window of frames, half a window further each time, of all videos in turn.
    stride = max(1, deployed.clip.num_frames // 2)
    for answer in deployed.windows(videos, stride=stride, batch=len(videos)):
        print(f"{answer.video} {answer.start_seconds:.2f}-{answer.end_seconds:.2f} s: ", end="")
        if answer.label is not None:
            print(f"{answer.label} {answer.score:.1%}")
        else:
            print({name: output.shape for name, output in answer.outputs.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
