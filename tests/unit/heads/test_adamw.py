"""The stacked optimiser against torch's, and against the algorithm written out."""

import pytest
import torch

from hilum.heads.adamw import StackedAdamW

RATES, DECAY = (1e-4, 1e-2, 3e-3), 0.05


def gradients_of(step: int, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 3 - 1) for parameter in parameters]


@pytest.fixture
def stacked() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(3, *shape, generator=generator) for shape in ((5, 4), (7,), (1,), (2, 3, 33))]


def test_equal_to_torch_bit_for_bit(stacked: list[torch.Tensor]) -> None:
    own = [[torch.nn.Parameter(part[row].clone()) for part in stacked] for row in range(3)]
    theirs = torch.optim.AdamW(
        [{"params": params, "lr": 0.0} for params in own], betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY, fused=True
    )
    ours = StackedAdamW(stacked, DECAY)
    for step in range(8):
        rates = [rate * (1 - step / 10) for rate in RATES]
        gradients = gradients_of(step, stacked)
        for row, (group, rate) in enumerate(zip(theirs.param_groups, rates, strict=True)):
            group["lr"] = rate
            for parameter, gradient in zip(group["params"], gradients, strict=True):
                parameter.grad = gradient[row].clone()
        theirs.step()
        ours.step([[gradient[row] for gradient in gradients] for row in range(3)], rates)
    for row in range(3):
        assert all(torch.equal(part[row], parameter) for part, parameter in zip(stacked, own[row], strict=True))


def test_equal_to_the_algorithm_in_float64(stacked: list[torch.Tensor]) -> None:
    values = [part.double() for part in stacked]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    rate = torch.tensor(RATES, dtype=torch.float64)
    ours = StackedAdamW(stacked, DECAY)
    for step in range(1, 9):
        gradients = gradients_of(step, stacked)
        ours.step([[gradient[row] for gradient in gradients] for row in range(3)], RATES)
        for place, gradient in enumerate(part.double() for part in gradients):
            own = rate.view(-1, *[1] * (gradient.dim() - 1))
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient**2
            values[place] *= 1 - own * DECAY
            values[place] -= (
                own * (first[place] / (1 - 0.9**step)) / ((second[place] / (1 - 0.999**step)).sqrt() + 1e-8)
            )
    for part, value in zip(stacked, values, strict=True):
        torch.testing.assert_close(part.double(), value, rtol=1e-6, atol=1e-7)


def test_gradients_may_lie_in_memory_as_they_like(stacked: list[torch.Tensor]) -> None:
    """The fused update reads memory in its order; a transposed gradient would move the wrong weights."""
    twin = [part.clone() for part in stacked]
    plain, transposed = StackedAdamW(stacked, DECAY), StackedAdamW(twin, DECAY)
    rows = [[gradient[row] for gradient in gradients_of(0, stacked)] for row in range(3)]
    plain.step(rows, RATES)
    transposed.step([[one.mT.contiguous().mT if one.dim() > 1 else one for one in row] for row in rows], RATES)
    assert all(torch.equal(*pair) for pair in zip(stacked, twin, strict=True))


def test_who_is_kept_goes_on_with_its_moments(stacked: list[torch.Tensor]) -> None:
    left = [part[[2, 0]] for part in stacked]
    whole = StackedAdamW(stacked, DECAY)
    pruned = StackedAdamW([part.clone() for part in stacked], DECAY)
    for step in range(3):
        rows = [[gradient[row] for gradient in gradients_of(step, stacked)] for row in range(3)]
        whole.step(rows, RATES)
        pruned.step(rows, RATES)
    left = [part[[2, 0]] for part in stacked]
    pruned.keep(left, [2, 0])
    rows = [[gradient[row] for gradient in gradients_of(5, stacked)] for row in range(3)]
    whole.step(rows, RATES)
    pruned.step([rows[2], rows[0]], (RATES[2], RATES[0]))
    assert all(torch.equal(one, part[[2, 0]]) for one, part in zip(left, stacked, strict=True))
