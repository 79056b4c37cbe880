"""Philox's numbers of a batch on a GPU, in one launch: see philox.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

BLOCK = 256  # of four numbers each, of a program


@triton.jit(do_not_specialize=["rows", "images", "blocks", "count", "epoch", "view", "first", "seed"])
def _keyed_uniform_kernel(
    samples,  # [images] int64
    step,  # 0-dim int64, in the epoch's place; or None
    out,  # [rows, count] float64
    rows,  # views * images
    images,
    blocks,  # of four numbers, of each row
    count,
    epoch: tl.int64,
    view: tl.int64,
    first: tl.int64,
    seed: tl.int64,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = i // blocks
    place = i % blocks
    exists = row < rows
    nothing = tl.zeros([BLOCK], tl.int64)
    b_epoch = nothing + (epoch if step is None else tl.load(step))
    b_sample = tl.load(samples + row % images, exists, 0)
    b_view = view + row // images
    b_block = first + place
    words = tl.philox(
        tl.full((), seed, tl.int64),
        b_sample.to(tl.uint32),
        b_epoch.to(tl.uint32),
        b_view.to(tl.uint32),
        b_block.to(tl.uint32),
    )
    start = out + row * count + 4 * place
    for j in tl.static_range(4):
        tl.store(start + j, (words[j].to(tl.float64) + 0.5) * 2.3283064365386963e-10, exists & (4 * place + j < count))


def keyed_uniform(
    samples: Tensor, step: Tensor | None, epoch: int, view: int, views: int, first: int, count: int, seed: int
) -> Tensor:
    samples = samples.contiguous()
    rows = views * len(samples)
    out = torch.empty(rows, count, dtype=torch.float64, device=samples.device)
    blocks = triton.cdiv(count, 4)
    if out.numel():
        grid = (triton.cdiv(rows * blocks, BLOCK),)
        sizes = (rows, len(samples), blocks, count)
        key = (epoch, view, first, seed)
        arguments = (samples, step, out, *sizes, *key)
        launch.launch(_keyed_uniform_kernel, grid, *arguments, BLOCK=BLOCK, num_warps=4, device_of=out)
    return out
