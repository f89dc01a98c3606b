"""Losses against their definitions, probes against explicit Hessians."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vcompress.compress.losses import TaskLoss, loss_of

LOSSES = [TaskLoss("kl_nats"), TaskLoss("squared_relative_error")]


def outputs(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (2, 2, 3, 5)])
def test_equal_outputs_cost_nothing_and_others_do(loss: TaskLoss, shape: tuple[int, ...]) -> None:
    reference = outputs(*shape)
    assert loss.values(reference, reference.clone()).tolist() == [0.0] * shape[0]
    other = reference.clone()
    other[1:] += torch.linspace(0, 1, shape[-1])
    values = loss.values(reference, other)
    assert values[0] == 0
    assert bool((values[1:] > 0).all())


def test_kl_of_a_sequence_is_the_mean_over_its_positions() -> None:
    reference, output = outputs(2, 7, 5), outputs(2, 7, 5) + outputs(5)
    expected = functional.kl_div(
        output.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1).mean(1)  # fmt: skip
    values = TaskLoss("kl_nats").values(reference, output)
    torch.testing.assert_close(values, expected)
    # Classes last in memory as well as not.
    strided = reference.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(TaskLoss("kl_nats").values(strided, output), expected)
    several = [each.reshape(2, 7, 1, 5).expand(2, 7, 3, 5) for each in (reference, output)]
    torch.testing.assert_close(TaskLoss("kl_nats").values(*several), expected)


def test_relative_error_is_of_each_clip() -> None:
    reference, output = outputs(2, 3), outputs(2, 3)
    output[1] *= 1.1
    expected = torch.tensor([0.0, 0.01])
    values = TaskLoss("squared_relative_error").values(reference, output)
    torch.testing.assert_close(values, expected)
    nothing = torch.zeros(1, 3)
    values = TaskLoss("squared_relative_error").values(nothing, nothing + 2)
    assert values.tolist() == [12.0]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_a_small_loss(loss: TaskLoss, bad: float) -> None:
    reference = outputs(2, 4)
    output = reference.clone()
    output[0, 1] = bad
    values = loss.values(reference, output)
    assert not bool(values[0].isfinite())
    assert values[1] == 0


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("shape", [(1, 4), (1, 3, 4), (2, 3)])
def test_probes_have_half_the_hessian_as_second_moment(
    loss: TaskLoss, shape: tuple[int, ...], together: int
) -> None:
    reference = outputs(*shape)

    def mean_loss(change: torch.Tensor) -> torch.Tensor:
        # `values` rounds to float32; the Hessian is taken of the same formula in float64.
        output = reference.double() + change
        if loss.name == "kl_nats":
            ours = reference.double().log_softmax(-1)
            divergence = (ours.exp() * (ours - output.log_softmax(-1))).sum(-1)
            return divergence.reshape(len(reference), -1).mean(1).sum()
        size = reference.double().flatten(1).square().sum(1)
        return (change.flatten(1).square().sum(1) / size).sum()

    nothing = torch.zeros(shape, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(mean_loss, nothing)
    hessian = hessian.reshape(reference.numel(), reference.numel())
    generator = torch.Generator().manual_seed(1)
    count = 20_000 // together
    # Every clip has probes of its own.
    many = reference.repeat(count, *[1] * (reference.ndim - 1))
    drawn = (
        [loss.probe(many, generator)] if together == 1 else loss.probes(many, together, generator)
    )
    probes = torch.cat([each.reshape(count, -1) for each in drawn]).double()
    count = len(probes)
    moment = probes.T @ probes / count
    assert float((moment - hessian / 2).abs().max()) < 0.04 * float(hessian.abs().max())
    # And the loss is what a step's probes say, for a small step.
    step = 1e-3 * torch.randn(shape, generator=generator)
    predicted = float((probes @ step.flatten().double()).square().mean())
    true = float(loss.values(reference, reference + step).double().sum())
    assert predicted == pytest.approx(true, rel=0.05)


def test_the_first_probe_has_most_of_the_curvature_and_certainty_has_none() -> None:
    loss = TaskLoss("kl_nats")
    logits = torch.tensor([[4.0, 3.0, -2.0, -3.0, -3.0], [60.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = loss.probes(logits, 2, torch.Generator().manual_seed(0))
    curvature = loss.curvature(logits)
    # The squares of both have the trace as their mean.
    assert 0.9 < float(first[0].square().sum() / 2 / curvature[0]) < 1
    assert float(second[0].square().sum()) < float(first[0].square().sum())
    assert curvature[1] < 1e-6 < curvature[0]
    for probe in (first, second):
        assert bool(probe.isfinite().all())
        assert float(probe[1].abs().max()) < 1e-3
    assert TaskLoss("squared_relative_error").curvature(logits).tolist() == [1.0, 1.0]


def test_the_task_decides() -> None:
    assert loss_of("classify").name == "kl_nats"
    for task in ("embed", "denoise", "restore", "generic"):
        assert loss_of(task).name == "squared_relative_error"  # type: ignore[arg-type]
