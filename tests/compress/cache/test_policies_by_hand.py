"""Each rule on a denoiser whose residuals are known, so that what runs is found with a pencil.

Each of three blocks adds a_n to every number; a mark is how many of them ran at a step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vcompress.compress.cache import Cached, CacheSection, apply_cache

FREE: dict[str, Any] = {"protect_first": 0, "protect_last": 0}


def cached(module: Any, policy: str, **settings: Any) -> Cached:
    section = CacheSection(policy=policy, num_steps=len(module.amounts), **{**FREE, **settings})
    return apply_cache(module, section)


def output(module: Any, step: int, latent: float = 10.0) -> float:
    with torch.no_grad():
        return float(module(torch.full((1, 2, 4), latent), torch.tensor(1000.0 - step)).mean())


def test_fixed_computes_one_step_of_interval_and_adds_its_residual(ramp: Any) -> None:
    module = ramp([1, 2, 3, 4, 5, 6, 7, 8, 9])
    cached(module, "fixed", interval=3)
    assert module.run() == "300300300"
    # Step 0 starts a generation: 10 + 3 x 1. Steps 1 and 2 add the same, whatever the latent is.
    assert [output(module, step, 10.0 + step) for step in range(4)] == [13, 14, 15, 13 + 3 * 4]


def test_fixed_computes_the_steps_of_its_list(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    cached(module, "fixed", compute_steps=(0, 4, 5))
    assert module.run() == "300033000"


def test_protected_steps_are_computed_at_both_ends(ramp: Any) -> None:
    module = ramp([1.0] * 10)
    cached(module, "fixed", interval=100, protect_first=3, protect_last=2)
    assert module.run() == "3330000033"


def test_magcache(ramp: Any) -> None:
    # Step:            0    1     2      3      4     5    6    7     8     9
    # growth           1    1.1   1.1    1.0    1.0   0.9  1    1     1     1
    # ratio            -    1.1   1.21   1(c)   1     .9   .9   .9(c) 1     1
    # error            -    .1    .31>.2 -> c   0     .1   .2   .3 -> c 0   0
    # Step 2: .1 + .21 > .2 is computed. 3, 4: 0. 5: .1. 6: .2 is not above .25. 7: .3 is.
    growth = (1, 1.1, 1.1, 1, 1, 0.9, 1, 1, 1, 1)
    module = ramp([1.0] * 10)
    cached(module, "magcache", threshold=0.25, max_skips=9, magnitudes=growth)
    assert module.run() == "3030000300"


def test_magcache_skips_at_most_so_many_in_a_row(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    with_no_table = cached(module, "magcache", threshold=0.1, max_skips=2)
    assert module.run() == "300300300"
    assert "no magnitudes" in with_no_table.report().notes[0]


def test_teacache(ramp: Any) -> None:
    # What the first layer sees is a_n, so d_n = |a_n - a_(n-1)| / a_(n-1), also after a reuse.
    # a_n      1   1.1   1.21   1.331   1.331  1.331  1.4641  2.9282  2.9282
    # d_n      -   .1    .1     .1      0      0      .1      1       0
    # error    -   .1    .2     .3->c   0      0      .1      1.1->c  0
    module = ramp([1, 1.1, 1.21, 1.331, 1.331, 1.331, 1.4641, 2.9282, 2.9282])
    handle = cached(module, "teacache", threshold=0.25)
    assert module.run() == "300300030"
    changes = handle.report().changes["call 1"]
    assert changes[1:] == pytest.approx((0.1, 0.1, 0.1, 0, 0, 0.1, 1, 0), abs=1e-5)


def test_teacache_maps_the_change_with_its_polynomial_inside_of_its_range(ramp: Any) -> None:
    # p(d) = 2 d + 0.1 on [0, 0.1]: .1 -> .3, 0 -> .1, 1 is cut to .1 -> .3.
    # a_n      1    1.1   1.1   1.1       2.2   2.2
    # p(d_n)   -    .3    .1    .1        .3    .1
    # error    -    .3    .4    .5->c     .3    .4
    module = ramp([1, 1.1, 1.1, 1.1, 2.2, 2.2, 2.2, 2.2])
    cached(
        module, "teacache", threshold=0.45, coefficients=(2.0, 0.1), signal_range=(0.0, 0.1)
    )  # fmt: skip
    # Steps 6 and 7: .5 -> computed, then .1.
    assert module.run() == "30030030"


def test_first_block_compares_with_the_last_computed_step(ramp: Any) -> None:
    # Block 0 adds a_n. d_n against the a of the last computed step:
    # a_n   1    1.05  1.08  1.2     1.25   1.31   1.33      1.33  1.2
    # d_n   -    .05   .08   .2->c   .042   .092   .108->c   0     .098
    module = ramp([1, 1.05, 1.08, 1.2, 1.25, 1.31, 1.33, 1.33, 1.2])
    cached(module, "first_block", threshold=0.1)
    assert module.run() == "311311311"
    # Step 0: 13. Step 1: block 0 adds 1.05 itself, the others what they added before, 1 each.
    assert [output(module, step) for step in range(2)] == pytest.approx([13, 13.05])


def test_first_block_with_blocks_at_the_back_runs_those_too(ramp: Any) -> None:
    module = ramp([1.0] * 8)
    cached(module, "first_block", threshold=0.1, back_blocks=1)
    assert module.run() == "32222222"
    assert module.num_runs == [8, 1, 8]


def test_first_block_with_two_blocks_in_front(ramp: Any) -> None:
    module = ramp([1.0] * 8)
    cached(module, "first_block", threshold=0.1, front_blocks=2)
    module.run()
    assert module.num_runs == [8, 8, 1]


def test_first_block_of_threshold_zero_reuses_only_what_is_equal(ramp: Any) -> None:
    module = ramp([1, 1, 1.5, 1.5, 1, 1, 1, 2])
    cached(module, "first_block", threshold=0.0)
    assert module.run() == "31313113"


def test_easycache(ramp: Any) -> None:
    # x_n = 10, 11, 12, ...: it moves by 1. a_n = n / 3: y_n = x_n + n moves by 2, so k = 2.
    # y_1 = 12. Step 2: error 2 x 1 / 12 = .167, reused: y = 12 + 1 = 13.
    # Step 3: error + 2 / 13 = .321 >= .3, computed: y_3 = 13 + 3 = 16; k = (16 - 12) / 2 = 2.
    # Step 4: 2 / 16 = .125, y = 17. Step 5: + 2 / 17 = .243, y = 18. Step 6: + 2 / 18 = .354 -> c.
    # y_6 = 22; k = 6 / 3 = 2. Step 7: 2 / 22 = .091.
    module = ramp([step / 3 for step in range(8)])
    handle = cached(module, "easycache", threshold=0.3)
    assert module.run([10.0 + step for step in range(8)]) == "33030030"
    assert handle.report().changes["call 1"][2:4] == pytest.approx((2 / 12, 2 / 13))


def test_taylorseer_continues_a_line_exactly(ramp: Any) -> None:
    # The residual 3 a_n = 3, 6, 9, ... is a line, so order 1 knows it from steps 0 and 3 on.
    module = ramp([1.0 + step for step in range(9)])
    cached(module, "taylorseer", interval=3, order=1)
    assert [output(module, step) for step in range(9)] == pytest.approx(
        [13, 13, 13, 22, 25, 28, 31, 34, 37]
    )
    assert module.num_runs == [3, 3, 3]


def test_taylorseer_takes_differences_over_what_lies_between_computed_steps(ramp: Any) -> None:
    # Residuals r_n = 3 n^2 at steps 0, 1, 2 (protected): D0 = 12, D1 = 9, D2 = (9 - 3) / 1 = 6.
    # Step 3: 12 + 9 + 6 / 2 = 24. Step 4: 12 + 18 + 6 x 4 / 2 = 42.
    module = ramp([float(step**2) for step in range(8)])
    cached(module, "taylorseer", interval=9, order=2, protect_first=3)
    assert [output(module, step) for step in range(5)] == pytest.approx([10, 13, 22, 34, 52])


def test_temporal_delta_decides_for_each_block(ramp: Any) -> None:
    # All blocks alike. a_n = 1, 1.1: rate .1. Steps 2, 3: error .1, .2. Step 4: two in a row were
    # reused. It is computed: a = 1.1, the rate 0, over 3 steps. 5, 6 reused, 7 computed.
    module = ramp([1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1])
    cached(module, "temporal_delta", threshold=0.25, max_skips=2)
    assert module.run() == "33003003"


def test_temporal_delta_takes_the_change_per_step_and_sums_it(ramp: Any) -> None:
    # a_0 = 1, a_1 = 1.1: rate .1; threshold .15. Step 2: .1 reused. Step 3: .2, computed; a = 1.32:
    # change .2 over 2 steps, rate .1. Step 4: .1 reused. Step 5: computed, a = 1.32, rate 0.
    # Steps 6, 7: reused.
    module = ramp([1, 1.1, 1.1, 1.32, 1.32, 1.32, 1.32, 1.32])
    cached(module, "temporal_delta", threshold=0.15)
    assert module.run() == "33030300"


def test_blocks_with_different_changes_are_skipped_on_their_own(ramp: Any) -> None:
    module = ramp([1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35])
    # The last block adds the same in every step, so it alone never changes.
    module.blocks[2].forward = lambda hidden, amount: hidden + 1.0
    handle = cached(module, "temporal_delta", threshold=0.01, max_skips=9)
    module.run()
    assert handle.report().hits.tolist() == [[0] * 8, [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]


def test_forecast_mixes_the_last_computed_outputs(ramp: Any) -> None:
    module = ramp([1, 2, 3, 4, 5, 6, 7, 8])
    weights = ((), (), (2, -1), (), (1, 2, -1), (), (), (0.5,))
    cached(module, "forecast", compute_steps=(0, 1, 3, 5, 6), mixture=weights)
    # A computed step n gives 10 + 3 (n + 1), whatever the latent of reused steps is.
    outputs = [output(module, step, 10.0 if step != 4 else 12.0) for step in range(8)]
    assert outputs[:4] == [13, 16, 2 * 16 - 13, 22]
    assert outputs[4] == 22 + 2 * 16 - 13
    assert outputs[5:] == [28, 31, pytest.approx(31 / 2)]
    assert module.num_runs == [5, 5, 5]


def test_forecast_computes_where_its_weights_are_for_another_history(ramp: Any) -> None:
    module = ramp([1.0] * 8)
    weights = ((), (), (2, -1), (), (2, -1), (), (2, -1), (1,))
    handle = cached(module, "forecast", compute_steps=(0, 1, 3, 5), mixture=weights)
    assert module.run() == "33030300"
    handle.reset()
    # A run that begins at step 1 has computed no step 0; at 7 one output is enough.
    with torch.no_grad():
        marks = [(sum(module.num_runs), output(module, step))[0] for step in range(1, 8)]
    runs = [*marks[1:], sum(module.num_runs)]
    assert [after - before for before, after in zip(marks, runs, strict=True)][:1] == [3]


def test_lists_of_another_number_of_steps_compute_everything(ramp: Any) -> None:
    module = ramp([1.0] * 9)
    for policy, settings in (
        ("forecast", {"mixture": ((), *((1,),) * 11)}), ("fixed", {}), ("taylorseer", {}),
    ):  # fmt: skip
        section = CacheSection(policy=policy, num_steps=12, compute_steps=(0,), **settings, **FREE)
        with apply_cache(module, section) as handle:
            handle.reset(9)
            assert module.run() == "3" * 9
            with pytest.warns(UserWarning, match="find a cache for 9 steps"):
                assert "this one has 9" in " ".join(handle.report().notes)
