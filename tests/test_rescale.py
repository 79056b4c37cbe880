"""Gradients of several shapes and layouts are multiplied by one factor in place: `rescale_` and `rescale_all_`."""

import pytest
import torch
from conftest import INTERPRETING
from torch import Tensor

import fastjem.ops  # noqa: F401

ops = torch.ops.fastjem


def gradients(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Of one shape, so that they share a launch, and of others: less than a vector, no whole one, none; transposed and
    channels-last."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    alike = [draw(33, 67) for _ in range(3)]
    last = draw(2, 5, 3, 3).to(memory_format=torch.channels_last)
    return [draw(3), *alike, draw(5000), draw(0, 4), draw(67, 33).T, last]


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rescaled_at_once(dtype: torch.dtype, gaps: bool, implementation) -> None:
    """Every one by the product of both factors, computed in float32 or wider and rounded once."""
    several = gradients(dtype, implementation.device)
    if gaps:
        several.append(torch.ones(8, 9, dtype=dtype, device=implementation.device)[:, :4])
    upstream = torch.tensor(-0.7, device=implementation.device)
    scale = torch.tensor(0.3, device=implementation.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [(x.to(wide) * (upstream * scale).to(wide)).to(dtype) for x in several]
    one_by_one = [x.clone() for x in several]
    ops.rescale_all_(several, upstream, scale)
    for x in one_by_one:
        ops.rescale_(x, upstream * scale)
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6}.get(dtype, 0)  # the factor is float32's product
    if INTERPRETING and dtype == torch.bfloat16:
        tolerance = 2**-7  # Triton's interpreter cuts float32 off there, and doesn't round it
    for x, alone, wanted in zip(several, one_by_one, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, wanted, rtol=tolerance, atol=0)
        torch.testing.assert_close(alone, wanted, rtol=tolerance, atol=0)


def test_what_isnt_the_gradients_stays(implementation) -> None:
    memory = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(implementation.device)
    before = memory.clone()
    ops.rescale_all_([memory[1], memory[3]], torch.tensor(2.0).to(memory), torch.tensor(2.0).to(memory))
    before[[1, 3]] *= 4
    assert torch.equal(memory, before)


def test_a_factor_of_one_writes_nothing(implementation) -> None:
    """What backward is given where it begins with the loss: infinities and their signs stay as they are, too."""
    for value in (float("inf"), float("-inf"), 1e-42):
        x = torch.full((300,), value, device=implementation.device)
        ops.rescale_all_([x], torch.tensor(2.0).to(x), torch.tensor(0.5).to(x))
        assert torch.equal(x, torch.full_like(x, value))
