"""What is kept never reaches a call that it does not belong to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.spec.errors import InputError

FREE: dict[str, Any] = {"num_steps": 9, "protect_first": 0, "protect_last": 0}
ALWAYS = CacheSection(policy="fixed", interval=99, **FREE)


def call(module: Any, timestep: float, latent: torch.Tensor | float = 10.0, **texts: Any) -> float:
    if not isinstance(latent, torch.Tensor):
        latent = torch.full((1, 2, 4), latent)
    with torch.no_grad():
        return float(module(latent, torch.tensor(timestep), **texts).float().mean())


def text(value: float) -> torch.Tensor:
    return torch.full((1, 1, 4), value)


def test_branches_have_their_own_state(ramp: Any) -> None:
    module = ramp([1.0, 2.0] + [5.0] * 7)
    apply_cache(module, ALWAYS)
    # The text is added in front of the blocks; what they add is the same in both branches.
    both = [call(module, 1000 - step, text=text(t)) for step in range(3) for t in (0.0, 1.0)]
    assert both == [13, 14, 13, 14, 13, 14]
    assert module.num_runs == [2, 2, 2]


def test_a_batch_of_both_branches_is_one(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    cached = apply_cache(module, ALWAYS)
    for step in range(9):
        call(module, 1000 - step, torch.full((2, 2, 4), 10.0))
    assert list(cached.report().branch_hits) == ["call 1"]
    assert module.num_runs == [1, 1, 1]


def test_steps_that_count_on_over_two_denoisers_need_to_be_told(ramp: Any) -> None:
    shared = CacheSection(
        policy="forecast", compute_steps=(0, 4), starts=(0, 4), **FREE,
        mixture=((), (1,), (1,), (1,), (), (1,), (1,), (1,), (1,)),
    )  # fmt: skip
    second = ramp([1.0] * 9)
    cached = apply_cache(second, shared)
    # Alone it would take its first steps for those of the run.
    assert second.run() == "3" * 9
    with pytest.warns(UserWarning, match="count on over 2 denoisers"):
        cached.report()
    cached.remove()
    first = ramp([1.0] * 9)
    together = apply_cache([first, second], shared)
    before = sum(first.num_runs) + sum(second.num_runs)
    for step in range(9):
        call(first if step < 4 else second, 1000 - step)
    assert sum(first.num_runs) + sum(second.num_runs) - before == 6
    assert together.report().hits.any()


def test_a_new_generation_starts_afresh(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    apply_cache(module, ALWAYS)
    assert [module.run(), module.run()] == ["300000000"] * 2


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_aborted_generation_leaves_the_next_one_right(ramp: Any, at: int) -> None:
    module = ramp([1.0 + step for step in range(9)])
    apply_cache(module, ALWAYS)
    expected = [call(module, 1000 - step) for step in range(9)]
    # The first one stops; nothing tells the cache so.
    for step in range(at + 1):
        call(module, 1000 - step, 30.0, text=text(1.0))
    assert [call(module, 1000 - step) for step in range(9)] == expected


def test_so_does_one_that_went_down_and_is_followed_by_one_that_begins_lower(ramp: Any) -> None:
    module = ramp([1.0 + step for step in range(9)])
    cached = apply_cache(module, ALWAYS)
    call(module, 1000), call(module, 999)
    # Other noise of the same size, as for another seed; step 4 adds 3 x 5.
    noise = torch.tensor([-10.0, 10.0]).repeat(4).view(1, 2, 4)
    assert call(module, 996, noise) == pytest.approx(15)
    assert "latent jumped" in cached.report().notes[0]


def test_another_prompt_is_another_generation(ramp: Any) -> None:
    module = ramp([1.0 + step for step in range(9)])
    cached = apply_cache(module, ALWAYS)
    call(module, 1000, text=text(0.0)), call(module, 999, text=text(0.0))
    assert call(module, 998, text=text(1.0)) == 10 + 1 + 3 * 3
    assert cached.report().notes == (
        "a generation was taken to start at step 2, since text changed",
    )


def test_an_equal_prompt_in_another_tensor_is_the_same_generation(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    apply_cache(module, ALWAYS)
    for step in range(9):
        call(module, 1000 - step, text=text(0.0))
    assert module.num_runs == [1, 1, 1]


@pytest.mark.parametrize(
    "latent",
    [torch.full((1, 3, 4), 10.0), torch.full((2, 2, 4), 10.0)],
    ids=["resolution", "batch"],
)
def test_another_shape_begins_again(ramp: Any, latent: torch.Tensor) -> None:
    module = ramp([1.0 + step for step in range(9)])
    apply_cache(module, ALWAYS)
    call(module, 1000), call(module, 999)
    assert call(module, 998, latent) == 10 + 3 * 3


def test_another_type_begins_again(ramp: Any) -> None:
    module = ramp([1.0 + step for step in range(9)])
    apply_cache(module, ALWAYS)
    call(module, 1000), call(module, 999)
    module.bfloat16()
    assert call(module, 998, torch.full((1, 2, 4), 10.0, dtype=torch.bfloat16)) == 10 + 3 * 3


def test_a_call_that_fails_leaves_nothing(ramp: Any) -> None:
    module = ramp([1.0 + step for step in range(9)])
    section = CacheSection(policy="fixed", compute_steps=(0, 2), **FREE)
    apply_cache(module, section)
    call(module, 1000), call(module, 999)
    own = module.blocks[1].layer.forward
    module.blocks[1].layer.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        call(module, 998)
    module.blocks[1].layer.forward = own
    assert call(module, 997) == 10 + 3 * 4


def test_reset_is_a_new_generation(ramp: Any) -> None:
    module = ramp([1.0 + step for step in range(9)])
    cached = apply_cache(module, ALWAYS)
    assert [call(module, 1000), call(module, 999)] == [13, 13]
    cached.reset()
    assert call(module, 998) == 10 + 3 * 3


class Scheduler:
    timesteps: list[int]

    def set_timesteps(self, num: int) -> None:
        self.timesteps = list(range(num))


def test_a_scheduler_tells_the_start_and_the_number_of_steps(ramp: Any) -> None:
    module, scheduler = ramp([1.0 + step for step in range(9)]), Scheduler()
    section = CacheSection(policy="fixed", interval=99, protect_first=0, protect_last=2)
    cached = apply_cache(module, section, scheduler=scheduler)
    scheduler.set_timesteps(9)
    assert module.run() == "300000033"
    call(module, 1000), call(module, 999)
    scheduler.set_timesteps(9)
    assert call(module, 998) == 10 + 3 * 3
    cached.remove()
    assert "set_timesteps" not in vars(scheduler)


def test_removed_it_leaves_no_trace(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    names, before = list(module.state_dict()), {**vars(module), **vars(module.blocks[0])}
    with apply_cache(module, ALWAYS):
        assert list(module.state_dict()) == names
        module.run()
    assert {**vars(module), **vars(module.blocks[0])}.keys() == before.keys()
    assert module.run() == "3" * 9


def test_a_copy_has_a_cache_of_its_own(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    cached = apply_cache(module, ALWAYS)
    twin = copy.deepcopy(module)
    call(module, 1000)
    assert twin.run() == "300000000"
    assert call(module, 999) == 13
    assert module.num_runs == [1, 1, 1]
    assert cached.report().num_generations == 1


def test_two_caches_are_refused(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    apply_cache(module, ALWAYS)
    with pytest.raises(InputError, match="has a cache already"):
        apply_cache(module, ALWAYS)


@pytest.mark.parametrize("modules", [[], [None, None], {}])
def test_no_denoiser_is_no_cache(modules: Any) -> None:
    with pytest.raises(InputError, match="at least one denoiser"):
        apply_cache(modules, ALWAYS)


def test_a_layer_learns_what_its_precision_depends_on(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    section = CacheSection(policy="fixed", interval=3, num_steps=9, protect_first=2, protect_last=2)
    cached = apply_cache(module, section)
    seen: dict[int, tuple[bool, bool]] = {}

    def look(*_: Any) -> None:
        moment = cached.moment
        assert moment is not None
        assert (moment.block, moment.branch, moment.num_steps) == ("blocks.1", "call 1", 9)
        seen[moment.step] = (moment.is_writing, moment.after_reuse)

    module.blocks[1].layer.register_forward_pre_hook(look)
    assert module.run() == "330030033"
    # Step 0 is followed by a protected one, 4 and 1 by steps that may reuse, 7 and 8 by none.
    assert seen == {
        0: (False, False), 1: (True, False), 4: (True, True), 7: (False, True), 8: (False, False),
    }  # fmt: skip
    assert cached.moment is None
