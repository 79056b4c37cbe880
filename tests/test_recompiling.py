"""What changes from step to step compiles nothing anew: temperatures, epsilons, and the number of a batch's rows.

A kernel takes one to two seconds to compile. A schedule moves DINO's teacher temperature at every step, and the last
batch of an epoch has a number of rows of its own.
"""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

import aot
import specialisations

from fastjem.kernels.contrastive import gpu_views


def _x(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def _mean_entropy(value: float, rows: int) -> None:
    aot.prototypes.mean_entropy([_x(rows, 32)] * 2, value, None, None, [True, True])


def _prototype_cross_entropy(value: float, rows: int) -> None:
    views = [_x(rows, 32)] * 2
    weights = _x(rows)
    options = (2 * value, value, _x(32), "different", weights, True, [True, True])
    aot.prototypes.prototype_cross_entropy(views, views, *options)


def _sinkhorn(value: float, rows: int) -> None:
    aot.prototypes.sinkhorn(_x(rows, 32), value, 2, True, torch.float32)


def _sinkhorn_wide(value: float, rows: int) -> None:
    aot.prototypes.sinkhorn(_x(rows, 16_384), value, 2, False, torch.float32)


def _negative_cosine(value: float, rows: int) -> None:
    aot.predictive.negative_cosine(_x(rows, 32), _x(rows, 32), value, [True, True])


def _regression(value: float, rows: int) -> None:
    aot.predictive.regression(_x(rows, 32), _x(rows, 32), value, True, value, [True])


def _regression_rows(value: float, rows: int) -> None:
    numbers = torch.zeros(rows, dtype=torch.int64)
    aot.predictive.regression_rows(_x(40, 32), _x(40, 32), numbers, _x(rows), value, True, value, [True])


def _cross_entropy(value: float, rows: int) -> None:
    labels = torch.zeros(rows, dtype=torch.int64)
    aot.supervised.cross_entropy(_x(rows, 32), labels, round(-1000 * value), [True])


def _barlow_twins(value: float, rows: int) -> None:
    aot.covariance.barlow_twins(_x(rows, 48), _x(rows, 48), value, 1, [True, True])


def _vicreg(value: float, rows: int) -> None:
    aot.covariance.vicreg(_x(rows, 48), _x(rows, 48), value, value, value, value, 1, [True, True])


def _characteristic(value: float, rows: int) -> None:
    theta = _x(2, rows, 32)
    aot.gaussian.characteristic_backward(theta, aot.gaussian.characteristic(theta, round(200 * value)))


def _rescale(value: float, rows: int) -> None:
    aot.weights.rescale_all_([_x(rows, 32)] * 2, torch.tensor(value), torch.tensor(value))


def _keyed_uniform(value: float, rows: int) -> None:
    samples = torch.zeros(rows, dtype=torch.int64)
    big = round(value * 1e11)  # seeds and steps of 32 bits, and of more
    aot.masks.keyed_uniform(samples, None, rows, 1, rows, 3 << 30, rows, big if value < 1 else 3)


def _masks(value: float, rows: int) -> None:
    drawn = torch.zeros(rows, 2 + 4 * rows, dtype=torch.float64)
    aot.masks.block_masks(drawn, None, rows, rows + 1, value, 0.5, 0.9, rows, 4 * rows, value, rows)
    aot.masks.inverse_rectangle_masks(drawn[:, :3], rows, rows + 1, rows, -value, value)
    drawn = torch.zeros(rows, 4 * 32 + rows * (rows + 1), dtype=torch.float64)
    aot.masks.even_block_scores(drawn, rows, rows + 1)
    drawn = torch.zeros(rows, 2 * (3 + 4 * rows), dtype=torch.float64)
    aot.masks.multi_block_masks(drawn, rows, rows + 1, [rows - 9, 3], [rows - 1, rows - 2], 3, rows)


CALLS: list[Callable[[float, int], None]] = [
    _mean_entropy, _prototype_cross_entropy, _sinkhorn, _sinkhorn_wide, _negative_cosine, _regression, _regression_rows,
    _cross_entropy, _barlow_twins, _vicreg, _characteristic, _rescale, _keyed_uniform, _masks,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.strip("_"))
def test_other_numbers_compile_nothing(call):
    needed = specialisations.needed["kernels"]
    needed.clear()
    with specialisations.specialising():
        call(0.04, 24)
        first = set(needed)
        assert first, "nothing was launched"
        for value, rows in ((0.041, 24), (0.05, 24), (1.0, 24), (0.07, 16), (0.1, 23)):
            call(value, rows)
            assert needed == first, f"{value} and {rows} rows compile {needed - first}"


def test_views_that_are_further_apart_compile_nothing(monkeypatch):
    """Two tensors are as far apart in memory as they happen to be, which may be less than 2^31 elements or more: not
    the time to compile while a CUDA graph is captured, whose memory is elsewhere."""
    views = [_x(24, 48), _x(24, 48)]
    found = []
    with specialisations.specialising():
        for apart in (1 << 12, 1 << 33, -(1 << 12), -(1 << 40)):
            monkeypatch.setattr(gpu_views, "as_one", lambda z: (z[0], 2, apart, 48))  # noqa: B023
            specialisations.needed["kernels"].clear()
            aot.contrastive.nt_xent_of_views(views, None, None, 0.5, False)
            found.append(set(specialisations.needed["kernels"]))
    assert found[0] and all(kernels == found[0] for kernels in found)
