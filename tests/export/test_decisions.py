"""Where tokens go is a decision, which a file may take otherwise among equals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from vcompress.compress.tokens.plan import section_of
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.graph import export_onnx
from vcompress.export.replay import Count, compare_decisions, forced_decisions
from vcompress.export.ties import count_ties, run_with_codes
from vcompress.models.load import load_model
from vcompress.models.video import PrimaryOutput, VideoModel

SCORES = torch.tensor([[0.5, 1.0, 1.0 + 1e-6, 0.2]])


@pytest.mark.parametrize(
    ("theirs", "differing", "unexplained"),
    [([2, 1, 0, 3], 0, 0), ([1, 2, 0, 3], 2, 0), ([2, 1, 3, 0], 2, 2), ([2, 0, 1, 3], 2, 2)],
)
def test_equals_may_change_places_and_no_others(
    theirs: list[int], differing: int, unexplained: int
) -> None:
    count = Count()
    compare_decisions(torch.tensor([[2, 1, 0, 3]]), torch.tensor([theirs]), SCORES, count)
    assert (count.values, count.differing, count.unexplained) == (4, differing, unexplained)


@pytest.fixture(scope="module")
def reduced() -> VideoModel:
    model = load_model("reference:penvideo20").copy()
    section = section_of(model, [128, 96, 96, 96], "bipartite", "proportional")
    apply_reduction(model, section)
    return model


@pytest.fixture(scope="module")
def graph(reduced: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decisions") / "model.onnx"
    export_onnx(reduced.module, reduced.example(2), path, dialect="portable")
    return path


def test_the_choices_of_a_file_are_read_and_put_in_place_of_torch_s(
    reduced: VideoModel, graph: Path
) -> None:
    # A clip that rests: tokens at one place are alike at all times.
    clip = reduced.example(1)
    assert isinstance(clip, torch.Tensor)
    clip = clip[:, :1].expand_as(clip).contiguous()
    run = run_with_codes(graph, clip, (), with_products=False)
    # Which tokens are merged, and into which.
    assert sorted(run.decisions) == [0, 1]
    found = count_ties(PrimaryOutput(reduced.module, clip), graph, clip)
    assert found.num_unexplained == 0
    assert found.forced_relative_l2 < 1e-5


def with_others(decisions: Mapping[int, torch.Tensor], number: int) -> dict[int, torch.Tensor]:
    return {**decisions, number: decisions[number].flip(1)}


@pytest.mark.parametrize("number", [0, 1])
def test_other_choices_are_another_answer_and_no_tie(
    reduced: VideoModel, graph: Path, number: int
) -> None:
    clip = reduced.example(1)
    run = run_with_codes(graph, clip, (), with_products=False)
    count = Count()
    with forced_decisions(with_others(run.decisions, number), count), torch.inference_mode():
        other = reduced(clip)
    assert count.unexplained > 0
    assert not torch.allclose(other, torch.from_numpy(run.output), rtol=1e-3, atol=1e-3)
