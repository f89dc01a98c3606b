from __future__ import annotations

import json
from typing import Any

import pytest

from vcompress.spec.cache_section import SETTINGS, CacheSection
from vcompress.spec.errors import InputError


@pytest.mark.parametrize("policy", SETTINGS)
def test_a_section_survives_its_file_and_says_all_that_its_policy_reads(policy: str) -> None:
    section = CacheSection(policy=policy, num_steps=50)
    data = json.loads(json.dumps(section.as_dict()))
    assert CacheSection.from_dict(data) == section
    assert set(data) == {
        "policy", "num_steps", "protect_first", "protect_last", "blocks", *SETTINGS[policy],
    }  # fmt: skip


def test_weights_of_steps_survive_their_file() -> None:
    section = CacheSection(policy="forecast", compute_steps=(0,), mixture=((), (1.0,), (2.0, -1.0)))
    data = json.loads(json.dumps(section.as_dict()))
    assert CacheSection.from_dict(data) == section
    # Plans of before there was a second denoiser have one.
    del data["starts"]
    assert CacheSection.from_dict(data) == section


def test_a_setting_that_the_policy_would_ignore_is_an_error() -> None:
    with pytest.raises(InputError, match=r"interval: policy magcache does not read it"):
        CacheSection(policy="magcache", interval=3)


def test_an_unknown_policy_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'magcache'"):
        CacheSection(policy="magcash")


@pytest.mark.parametrize(
    "change",
    [
        {"policy": 3}, {"num_steps": 0}, {"num_steps": 7.5}, {"protect_first": -1},
        {"protect_last": None}, {"threshold": -0.1}, {"threshold": "0.1"}, {"threshold": True},
        {"max_skips": -1}, {"coefficients": []}, {"coefficients": ["a"]}, {"blocks": [3]},
        {"blocks": "blocks.0"}, {"signal_range": [2, 1]}, {"signal_range": [1]}, {"interval": 2},
        {"thresold": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_an_input_error(change: dict[str, Any]) -> None:
    data = CacheSection(policy="teacache", num_steps=50).as_dict()
    CacheSection.from_dict(data)
    with pytest.raises(InputError):
        CacheSection.from_dict({**data, **change})


@pytest.mark.parametrize(
    ("policy", "change"),
    [
        ("taylorseer", {"order": 4}), ("taylorseer", {"interval": 0}),
        ("first_block", {"front_blocks": 0}), ("fixed", {"compute_steps": [1.5]}),
        ("magcache", {"magnitudes": 3}), ("forecast", {"mixture": [1.0]}),
        ("forecast", {"mixture": [[1.0, 2.0, 3.0, 4.0]]}), ("forecast", {"mixture": [["a"]]}),
        ("forecast", {"starts": []}), ("forecast", {"starts": [1, 4]}),
        ("forecast", {"starts": [0, 4, 4]}), ("forecast", {"starts": 0}),
    ],
)  # fmt: skip
def test_so_is_one_of_another_policy(policy: str, change: dict[str, Any]) -> None:
    data = CacheSection(policy=policy).as_dict()
    with pytest.raises(InputError):
        CacheSection.from_dict({**data, **change})
