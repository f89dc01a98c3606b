"""The one importer of TensorRT: builds one engine in a process of its own.

`vcompress.export.engine` runs this file, writes one JSON request to its standard input and reads
one JSON event a line from its standard output. A process of its own, because native compilers can
crash: some valid graphs end TensorRT-RTX 1.7.1 with a segmentation fault, which then costs an error
message and not the whole run.

It imports only the standard library and, lazily, TensorRT: nothing of vcompress.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["RUNTIMES", "compute_capabilities", "load_library", "main"]

RUNTIMES = ("tensorrt-rtx", "tensorrt")

Event = dict[str, Any]
Emit = Callable[[Event], None]
# The parser announces each node before it checks and before it translates it.
_NODE = re.compile(
    r"(?:Static check for parsing|Parsing) node: (?P<name>.*) \[(?P<operator>\w+)\]$"
)


def load_library(runtime: str) -> Any:
    """The module `tensorrt_rtx` or `tensorrt`; both have the same interface.

    Raises:
        ImportError: the library is not installed, or a library that it needs is not there.
    """
    if runtime == "tensorrt-rtx":
        import tensorrt_rtx

        return tensorrt_rtx
    import tensorrt

    return tensorrt


def compute_capabilities(library: Any) -> tuple[str, ...]:
    """Compute capabilities ("120") that TensorRT-RTX can build for, whatever this machine has."""
    names = (re.fullmatch(r"SM(\d+)", name) for name in library.ComputeCapability.__members__)
    return tuple(sorted((match[1] for match in names if match), key=int))


def _logger(library: Any, emit: Emit, messages: list[str]) -> Any:
    """A TensorRT logger that keeps warnings and errors, and reports the node being parsed."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.node: dict[str, str] = {"name": "", "operator": ""}

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.WARNING:
                messages.append(f"{str(severity).rsplit('.', 1)[-1]}: {message}")
            elif match := _NODE.match(message):
                self.node = match.groupdict()
                emit({"event": "node", **self.node})

    return Logger()


def _progress_monitor(library: Any, emit: Emit) -> Any:
    """A TensorRT progress monitor; only the outermost phase has a meaningful fraction."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self.steps[phase] = num_steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                fraction = min(1.0, (step + 1) / max(1, self.steps[phase]))
                emit({"event": "progress", "phase": phase, "fraction": fraction})
            return True

        def phase_finish(self, phase: str) -> None:
            # Not every builder reports its last step.
            if self.steps.pop(phase, None) is not None:
                emit({"event": "progress", "phase": phase, "fraction": 1.0})

    return Monitor()


def _tensors(library: Any, count: int, get: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": get(index).name,
            "dtype": str(get(index).dtype).rsplit(".", 1)[-1].lower(),
            "shape": list(get(index).shape),
        }
        for index in range(count)
    ]


def _parser_errors(parser: Any, logger: Any) -> list[dict[str, str]]:
    """What the parser objects to; a check that names no node is about the node it was at."""
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = {"name": error.node_name(), "operator": error.node_operator()}
        if not node["operator"]:
            node = logger.node
        errors.append({**node, "text": error.desc()})
    return errors


def _config(library: Any, builder: Any, request: dict[str, Any], monitor: Any) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    if request["runtime"] == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        capability = getattr(library.ComputeCapability, f"SM{request['sm']}")
        config.set_compute_capability(capability, 0)
    if request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in request["profiles"].items():
            profile.set_shape(name, minimum, optimum, maximum)
        config.add_optimization_profile(profile)
    return config


def _build(request: dict[str, Any], emit: Emit) -> Event:
    library = load_library(request["runtime"])
    messages: list[str] = []
    started = time.perf_counter()
    logger = _logger(library, emit, messages)
    builder = library.Builder(logger)
    # TensorRT 11 and TensorRT-RTX know strongly typed networks only: precision is in the graph.
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        errors = _parser_errors(parser, logger)
        return {"event": "failed", "stage": "parse", "errors": errors, "messages": messages}
    emit({"event": "parsed"})

    monitor = _progress_monitor(library, emit)
    config = _config(library, builder, request, monitor)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"event": "failed", "stage": "build", "errors": [], "messages": messages}
    with open(request["engine"], "wb") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    return {
        "event": "done",
        "version": library.__version__,
        "seconds": time.perf_counter() - started,
        "num_layers": network.num_layers,
        "inputs": _tensors(library, network.num_inputs, network.get_input),
        "outputs": _tensors(library, network.num_outputs, network.get_output),
        "messages": messages,
    }


def main() -> None:
    """Read one request from standard input, build, and write events to standard output."""
    # What native code prints goes to standard error: standard output carries events alone.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        print(json.dumps(event), file=events, flush=True)

    emit(_build(json.load(sys.stdin), emit))


if __name__ == "__main__":
    main()
