"""What is said of a run, and that silence is an error."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.spec.errors import InputError


def test_every_block_and_step_is_counted(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    cached = apply_cache(module, CacheSection(policy="fixed", num_steps=9, interval=3))
    module.run()
    module.run()
    report = cached.report()
    assert report.blocks == ("blocks.0", "blocks.1", "blocks.2")
    # Three protected at the front, one at the back: ###..#..#.
    expected = np.tile([0, 0, 0, 2, 2, 0, 2, 2, 0], (3, 1))
    assert np.array_equal(report.hits, expected)
    assert np.array_equal(report.calls, np.full((3, 9), 2))
    assert np.array_equal(report.consulted, report.calls)
    assert report.skip_rate == pytest.approx(4 / 9)
    assert report.num_generations == 2
    assert "blocks.2 ###..#..#" in str(report)
    # One residual of 1 x 2 x 4 float32 and three scalars of 1, 8 and 4 bytes.
    assert report.state_bytes == 32 + 13
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_cache_that_was_never_consulted_is_an_error(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    cached = apply_cache(module, CacheSection(policy="fixed", num_steps=9))
    with pytest.raises(InputError, match="never consulted: the model that it was applied to"):
        cached.report()


def test_so_is_one_whose_blocks_are_not_called(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    module.other = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    section = CacheSection(policy="fixed", num_steps=9, blocks=("other.0",))
    cached = apply_cache(module, section)
    module.run()
    with pytest.raises(InputError, match=r"none of its blocks \(other\.0"):
        cached.report()


def test_no_hits_are_a_warning_with_the_smallest_change(ramp: Any) -> None:
    module = ramp([1, 2, 4, 8, 16, 32, 64, 128])
    cached = apply_cache(module, CacheSection(policy="first_block", num_steps=8, threshold=0.5))
    module.run()
    with pytest.warns(UserWarning, match="reused nothing in 1 generations.*change of a step 1;"):
        cached.report()


def test_few_steps_are_all_computed_and_the_report_says_why(ramp: Any) -> None:
    module = ramp([1.0] * 4)
    section = CacheSection(policy="fixed", num_steps=4, protect_first=0, protect_last=0)
    cached = apply_cache(module, section)
    assert module.run() == "3333"
    with pytest.warns(UserWarning, match="caching cannot pay in 4 steps"):
        cached.report()


def test_a_run_that_is_longer_than_was_said_is_computed_to_its_end(ramp: Any) -> None:
    module = ramp([1.0] * 12)
    cached = apply_cache(module, CacheSection(policy="fixed", num_steps=9, protect_last=0))
    assert module.run() == "333030303333"
    assert cached.report().notes == ("the run goes on after step 8, though num_steps is 9",)


def test_without_a_number_of_steps_the_remedy_is_named(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    apply_cache(module, CacheSection(policy="fixed"))
    with pytest.raises(InputError, match=r"scheduler=pipe\.scheduler"):
        module.run()
