"""Masks of patches on the CPU, in C++: an image after the other, each only as many tries as it needs."""

import math

import torch
from torch import Tensor

from .. import _C
from ..native import address


def keyed_uniform(
    samples: Tensor, step: Tensor | None, epoch: int, view: int, views: int, first: int, count: int, seed: int
) -> Tensor:
    samples = samples.contiguous()
    images = len(samples)
    out = torch.empty(views * images, count, dtype=torch.float64)
    epoch = epoch if step is None else int(step)
    if out.numel():
        threads = torch.get_num_threads()
        _C.keyed_uniform(address(samples), images, epoch, view, views, first, count, seed, address(out), threads)
    return out


def block_masks(
    drawn: Tensor,
    wanted: Tensor | None,
    height: int,
    width: int,
    images: float,
    low: float,
    high: float,
    least: int,
    most: int,
    aspect: float,
    attempts: int,
) -> Tensor:
    drawn = drawn.double().contiguous()
    wanted = None if wanted is None else wanted.double().contiguous()
    out = torch.empty(len(drawn), height, width, dtype=torch.bool)
    _C.block_masks(
        address(drawn),
        address(wanted),
        len(drawn),
        (drawn.shape[1] - 2) // 4,
        height,
        width,
        images,
        low,
        high,
        least,
        most,
        math.log(1 / aspect),
        attempts,
        address(out),
        torch.get_num_threads(),
    )
    return out


def even_block_scores(drawn: Tensor, height: int, width: int) -> Tensor:
    drawn = drawn.double().contiguous()
    out = torch.empty(len(drawn), height * width, dtype=torch.float64)
    rectangles = (drawn.shape[1] - height * width) // 4
    threads = torch.get_num_threads()
    _C.even_block_scores(address(drawn), len(drawn), rectangles, height, width, address(out), threads)
    return out


def inverse_rectangle_masks(drawn: Tensor, height: int, width: int, seen: int, low: float, high: float) -> Tensor:
    drawn = drawn.double().contiguous()
    out = torch.empty(len(drawn), height, width, dtype=torch.bool)
    threads = torch.get_num_threads()
    _C.inverse_rectangle_masks(address(drawn), len(drawn), height, width, seen, low, high, address(out), threads)
    return out


def multi_block_masks(
    drawn: Tensor, height: int, width: int, target: list[int], context: list[int], targets: int, keep: int
) -> tuple[Tensor, Tensor]:
    drawn = drawn.double().contiguous()
    out = torch.empty(len(drawn), height, width, dtype=torch.bool)
    indices = torch.empty(len(drawn), targets, target[0] * target[1], dtype=torch.int64)
    places = (drawn.shape[1] // 2 - targets) // (targets + 1)
    _C.multi_block_masks(
        address(drawn),
        len(drawn),
        places,
        height,
        width,
        *target,
        *context,
        targets,
        keep,
        address(out),
        address(indices),
        torch.get_num_threads(),
    )
    return out, indices
