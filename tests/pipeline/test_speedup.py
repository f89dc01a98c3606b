"""Speed-up and memory with real processes; no time is asserted, only what is made of it."""

from __future__ import annotations

from pathlib import Path

import torch

from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.pipeline.performance import modes_of, peak_memory
from vcompress.pipeline.process_pairs import Arm
from vcompress.pipeline.run import Silent
from vcompress.pipeline.speedup import measure_speedup, time_graphs
from vcompress.validate.latency import measure_interleaved


def test_a_tenth_of_the_work_is_faster() -> None:
    once, ten_times = Arm(block_seconds=0.002), Arm(repeat=1000, block_seconds=0.002)
    found = measure_speedup(ten_times, once, 1.2, Silent(), looks=(2,))
    # Far from the truth, 10: nothing that a busy machine does moves it so far.
    assert found.speed_ratio > 2
    assert found.num_pairs == 2
    assert measure_speedup(once, ten_times, 1.5, Silent(), looks=(2,)).outcome == "fail"


def test_a_graph_has_its_modes_and_its_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(1, 3, 4, 16, 16)
    # 64 MiB of weights are more than what a process differs by from run to run.
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5461))
    path = tmp_path / "model.onnx"
    export_onnx(network, example, path, dialect="portable")
    session = open_session(path)
    sessions = {"one": session, "other": session}
    stream = measure_interleaved(
        {name: lambda: session.run(example.numpy()) for name in sessions}, warm_up=1, rounds=5
    )
    modes = modes_of(sessions, example, stream)
    for name, (single, batch) in modes.items():
        assert (single["mode"], single["batch_size"]) == ("stream", 1)
        assert single["p50_ms"] == stream[name].p50_ms
        assert (batch["mode"], batch["batch_size"]) == ("batch", 8)
        assert batch["clips_per_second"] > 0
    # A bar so far away that any two times of one graph reach it.
    found = time_graphs(
        path, path, example, 0.01, Silent(), tmp_path, looks=(2,), block_seconds=0.002
    )
    assert found.outcome == "pass"
    memory = peak_memory(path, session, example)
    assert memory["idle_mib"] is not None
    assert memory["peak_mib"] is not None
    assert 60 < memory["peak_mib"] - memory["idle_mib"] < 400
