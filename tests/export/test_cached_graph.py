"""A whole generation with the cache in the graph, step by step against the live cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.export import engine
from vcompress.export.cached_graph import CachedFacts, export_cached
from vcompress.export.openvino_runtime import open_openvino
from vcompress.export.runtime import open_session
from vcompress.models.calls import Call
from vcompress.spec.errors import InputError

STEPS = 8
Array = npt.NDArray[Any]
SECTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"interval": 3},
    "first_block": {"threshold": 0.2},
    "taylorseer": {"interval": 3, "order": 1},
    "forecast": {
        "compute_steps": (0, 1, 4, 7),
        "mixture": (
            (), (), (2.0, -1.0), (3.0, -2.0), (), (1.5, -0.5), (2.0, -1.2, 0.2), (),
        ),
    },
}  # fmt: skip


class Named(nn.Module):
    """The denoiser, called with a dictionary."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, call: dict[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = self.denoiser(**call, return_dict=False)[0]
        return output


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def call() -> Call:
    generator = torch.Generator().manual_seed(1)
    return Call(tensors={
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
    })  # fmt: skip


def section_of(policy: str) -> CacheSection:
    return CacheSection(
        policy=policy, num_steps=STEPS, protect_first=1, protect_last=1, **SECTIONS[policy]
    )


def generate(call: Call, step: Callable[[dict[str, Array], int], Array]) -> list[Array]:
    """The outputs of all steps, each of which changes the latent."""
    inputs = {name: tensor.numpy() for name, tensor in call.flat.items()}
    outputs = []
    for number in range(STEPS):
        inputs["timestep"] = np.array([900.0 - 100 * number], np.float32)
        outputs.append(step(inputs, number))
        inputs["hidden_states"] = inputs["hidden_states"] - np.float32(0.1) * outputs[-1]
    return outputs


def live(denoiser: nn.Module, section: CacheSection, call: Call) -> tuple[list[Array], float]:
    """The same with the cache in Python, and its share of reused steps."""
    module = copy.deepcopy(denoiser)
    cached = apply_cache(module, section)

    def step(inputs: dict[str, Array], _number: int) -> Array:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.no_grad():
            return module(**tensors, return_dict=False)[0].numpy()

    return generate(call, step), cached.report().skip_rate


def in_graph(facts: CachedFacts, session: Any) -> Callable[[dict[str, Array], int], Array]:
    state = facts.first_state()

    def step(inputs: dict[str, Array], number: int) -> Array:
        nonlocal state
        known = {"step": np.array([number]), **inputs, **state}
        outputs = session.run_named({name: known[name] for name in session.input_names})
        state = facts.next_state(outputs)
        return np.asarray(outputs["output"])

    return step


@pytest.mark.parametrize("policy", list(SECTIONS))
def test_a_generation_with_an_if_follows_the_live_cache(
    denoiser: nn.Module, call: Call, tmp_path: Path, policy: str
) -> None:
    section = section_of(policy)
    path = tmp_path / "step.onnx"
    facts = export_cached(Named(denoiser), section, call, path, num_steps=STEPS)
    (branch,) = (node for node in onnx.load(path).graph.node if node.op_type == "If")
    sizes = sorted(len(attribute.g.node) for attribute in branch.attribute)
    assert sizes[0] < 25 < 50 < sizes[1], "the blocks stand in one branch alone"
    expected, skipped = live(denoiser, section, call)
    assert 0 < skipped < 1
    for session in (open_session(path, threads=1), open_openvino(path, threads=1)):
        for got, wanted in zip(generate(call, in_graph(facts, session)), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
    # Another generation begins with another state: nothing is left of the one before.
    again = generate(call, in_graph(facts, open_session(path, threads=1)))
    np.testing.assert_allclose(again[-1], expected[-1], atol=2e-5)


def test_a_stale_state_is_seen(denoiser: nn.Module, call: Call, tmp_path: Path) -> None:
    section = section_of("fixed")
    path = tmp_path / "step.onnx"
    facts = export_cached(Named(denoiser), section, call, path, num_steps=STEPS)
    session = open_session(path, threads=1)
    step = in_graph(facts, session)
    generate(call, step)
    # Step 1 of another video, with what is left of the first.
    other = {name: tensor.numpy() + 1 for name, tensor in call.flat.items()}
    inputs = {**other, "timestep": np.array([800.0], np.float32)}
    fresh = in_graph(facts, session)(inputs, 1)
    assert np.abs(step(inputs, 1) - fresh).max() > 1e-3


@pytest.mark.parametrize(
    ("policy", "computes"),
    [
        ("fixed", lambda number, state: number in (0, STEPS - 1) or state["state.skips"] >= 2),
        ("forecast", lambda number, _: number in SECTIONS["forecast"]["compute_steps"]),
    ],
)  # fmt: skip
def test_a_pair_takes_turns_as_the_host_decides(
    denoiser: nn.Module, call: Call, tmp_path: Path, policy: str, computes: Any
) -> None:
    section = section_of(policy)
    made = {
        kind: export_cached(
            Named(denoiser), section, call, tmp_path / f"{kind}.onnx", num_steps=STEPS, kind=kind
        )
        for kind in ("full", "cached")
    }  # fmt: skip
    nodes = {kind: len(onnx.load(facts.files[0]).graph.node) for kind, facts in made.items()}
    assert nodes["cached"] < nodes["full"] / 2
    sessions = {kind: open_session(facts.files[0], threads=1) for kind, facts in made.items()}
    state = made["full"].first_state()

    def step(inputs: dict[str, Array], number: int) -> Array:
        nonlocal state
        session = sessions["full" if computes(number, state) else "cached"]
        known = {"step": np.array([number]), **inputs, **state}
        outputs = session.run_named({name: known[name] for name in session.input_names})
        state = {**state, **{
            name: outputs[f"next.{name}"] for name in state if f"next.{name}" in outputs
        }}  # fmt: skip
        return np.asarray(outputs["output"])

    expected, _ = live(denoiser, section, call)
    for got, wanted in zip(generate(call, step), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_tensorrt_rtx_builds_it(denoiser: nn.Module, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    export_cached(
        Named(denoiser), section_of("first_block"), call, path, num_steps=STEPS, dialect="tensorrt"
    )
    assert engine.build_engine(path, tmp_path / "step.engine").num_bytes > 0


def test_what_cannot_stand_in_a_graph_is_refused(
    denoiser: nn.Module, call: Call, tmp_path: Path
) -> None:
    section = CacheSection(policy="teacache", threshold=0.1, num_steps=STEPS)
    with pytest.raises(InputError, match="teacache cannot stand in a graph"):
        export_cached(Named(denoiser), section, call, tmp_path / "m.onnx", num_steps=STEPS)
