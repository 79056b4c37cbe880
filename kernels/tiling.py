"""The one home of block sizes, warps, pipeline stages, program counts and memory budgets.

A function returns a launch's keyword arguments, by width, dtype and chip (chips.py). There is no autotuning: the
choices are few, they hold for every batch size, and nothing is tried inside a CUDA graph's capture. Registers and
spills of each are in benchmarks/results/ahead-of-time.md.

BM rows x BN columns x BLOCK_D of the width: a tile of a product. ROWS, BLOCK: rows and columns of what a program reads
at a time. STAGES, num_stages: how many such reads are in flight.
"""

import torch

from . import chips
from .chips import product_tile as _tile

# Program counts and memory budgets ------------------------------------------------------------------------------------

# Of work that is split among programs: two for each SM of an H200, on every GPU, as the order of sums depends on it.
PROGRAMS = 264

COLUMN_SUMS = 1 << 24  # float32 numbers, 64 MiB: the parts that columns' log-sum-exps are joined from
WEIGHTS_BYTES = 1 << 27  # the weights of a contrastive gradient, a band of rows at a time

SCALED_AHEAD = 1 << 22  # elements of a gradient: worth a launch before, if backward then leaves them alone

CPU_TILE = 1024  # rows and columns of similarities: 4 MiB of float32, the second-level caches of two cores
CPU_KOLEO_ROWS = 256  # of a strip of a symmetric product: 10 of 16 blocks of 1024 rows are computed
CPU_BANK_ROWS = 64  # of a memory bank at a time, at the least: wide rows still make a product worth a call
# The most that few rows' losses take in one call (contrastive/small.py): their similarities, and those times the width.
CPU_SMALL_SQUARE = 64 * 64
CPU_SMALL_PRODUCT = 64 * 64 * 64
CPU_FEW_ROWS = 32 * 32 * 32  # N D min(N, D) of Barlow Twins and VICReg in one call, in double (covariance/few_rows.h)
CPU_SYMMETRIC_WORK = 1 << 24  # multiplications of x @ x.T from which halves are worth several calls
CPU_SYMMETRIC_PARTS = 4  # of the rows of x @ x.T: 10 of 16 blocks are computed, 6 mirrored
HEAD_USAGE_BYTES = 64 << 20  # logits of student and teacher of some images, where a row's are needed together
CPU_HEAD_BYTES = 8 << 20  # logits of student and teacher at a time: the L2 caches hold most of it, products stay large

GRAM_ROWS = 256  # of a Gram matrix at a time: that of 14 x 14 patches is one tile
GRAM_TILE = 1 << 19  # its elements: 2 MiB of float32 a tile, of which there are three at the most


def gram(groups: int, patches: int) -> tuple[int, int]:
    """Rows of a tile, and of how many images at once."""
    rows = min(patches, GRAM_ROWS)
    return rows, min(groups, max(1, GRAM_TILE // (rows * patches)))


def gram_bands(groups: int, patches: int, dtype: torch.dtype) -> tuple[int, int]:
    """On a GPU, by the dtype of weights: rows of which those are in memory, and of how many images at once."""
    stride = -(-patches // 8) * 8  # whole 16-byte words
    rows = min(patches, max(128, WEIGHTS_BYTES // (stride * dtype.itemsize) // 128 * 128))
    at_once = max(1, WEIGHTS_BYTES // (stride * dtype.itemsize * rows)) if rows == patches else 1
    return rows, min(groups, at_once)


def gram_weights(dtype: torch.dtype) -> dict:
    """Tiles of two products at once. BM is a multiple of BN."""
    if dtype.itemsize == 2:
        return {"BLOCK_D": 64} | _tile(rows=128, columns=64, warps=8, stages=3)
    return {"BLOCK_D": 32} | _tile(rows=64, columns=64, warps=8, stages=2)


# Shared ---------------------------------------------------------------------------------------------------------------

WARP = 32


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block(width: int) -> int:
    """The columns of a block that holds whole rows."""
    return max(16, _next_power_of_2(width))


def _rows(width: int, per_thread: int) -> dict | None:
    """Whole rows in the registers of at most 16 warps, several rows where they are short; None: too wide."""
    block = _block(width)
    warps = max(4, block // (WARP * per_thread))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": warps} if warps <= 16 else None


def mean_of_rows() -> dict:
    return {"BLOCK": 4096, "num_warps": 16}


# weights --------------------------------------------------------------------------------------------------------------


def elementwise(dtype: torch.dtype) -> dict:
    """Four 128-bit words a thread are enough bytes in flight. A VECTOR is at least one such word in every dtype."""
    return {"BLOCK": 4 * 4 * WARP * 16 // dtype.itemsize, "VECTOR": 8, "num_warps": 4}


# optimizers -----------------------------------------------------------------------------------------------------------

OPTIMIZER_PART = 16  # blocks, at the least, whose squares one program adds


def optimizer() -> dict:
    """Two 128-bit words of float32 a thread from each of five tensors."""
    return {"BLOCK": 1024, "VECTOR": 8, "num_warps": 4}


# supervised and predictive --------------------------------------------------------------------------------------------


def cross_entropy(width: int, compute: torch.dtype) -> dict | None:
    """Rows read once, up to 16,384 float32; None where `cross_entropy_long` must read them twice."""
    return _rows(width, per_thread=128 // compute.itemsize)


def cross_entropy_long(compute: torch.dtype, of_rows: bool) -> dict:
    """One program an SM, because what all programs read once has to stay in the L2 cache until they read it again.

    With weights and smoothing 64 registers aren't enough (32 warps spill 2 on sm_90): half the block, half the warps.
    Of a float32 or float64 row two blocks wait in shared memory: 128 KiB of the larger ones, too much for small chips.
    """
    if of_rows or not chips.current().roomy:
        return {"BLOCK": 32768 // compute.itemsize, "num_warps": 16, "STAGES": 3}
    return {"BLOCK": 65536 // compute.itemsize, "num_warps": 32, "STAGES": 3}


def negative_cosine(width: int, compute: torch.dtype) -> dict | None:
    """Pairs of rows read once, up to 8192 float32; None where `negative_cosine_long` must read them twice."""
    return _rows(width, per_thread=64 // compute.itemsize)


def negative_cosine_long(compute: torch.dtype) -> dict:
    return {"BLOCK": 16384 // compute.itemsize, "num_warps": 16, "STAGES": 2}


def regression(width: int, compute: torch.dtype) -> dict | None:
    """As `negative_cosine`: prediction and target stay in registers."""
    return negative_cosine(width, compute)


def regression_long(compute: torch.dtype) -> dict:
    return negative_cosine_long(compute)


# gaussian -------------------------------------------------------------------------------------------------------------


def characteristic() -> dict:
    """128 rows: what a program writes of each frequency is then a 64th of what it reads."""
    return {"ROWS": 128, "BLOCK": 32, "num_warps": 8}


def characteristic_backward() -> dict:
    return {"ROWS": 16, "BLOCK": 64, "num_warps": 4}


# augment --------------------------------------------------------------------------------------------------------------


def crop_resize(pixels: int) -> dict:
    return {"BLOCK": min(256, max(32, _next_power_of_2(pixels))), "num_warps": 4}


# contrastive ----------------------------------------------------------------------------------------------------------


def _block_on_chip(width: int, dtype: torch.dtype) -> int | None:
    """The columns of rows that stay on the chip; None: too wide, float32 (three products for one), no tensor cores."""
    block = _block(width)
    widest = 64 if width % 16 else 256  # numbers that are read one by one take registers: 100 columns spill on sm_90
    return block if dtype.itemsize == 2 and block <= widest and chips.current().tensor_cores else None


def similarity_rows(width: int) -> dict:
    block = _block(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": min(16, max(4, block // 1024))}


def similarity_join() -> dict:
    """Of log-sum-exps: the join of their parts, and their form for the kernels of gradients (rows.lse_states)."""
    return {"BLOCK": 128, "num_warps": 4}


def views_rows(width: int) -> dict:
    """Half of `similarity_rows`, with sums in float64; less of 40, 100 and 512 (sm_80) columns, as more spill."""
    block = _block(width)
    rows = 1 if block > 256 else (1024 if width % 16 == 0 else 512 if block <= 64 else 256) // block
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, block // 1024))}


def join_rows(few: bool) -> dict:
    """Of log-sum-exps and a loss of them; a few thousand rows are one program's."""
    # Four rows a thread: with so many registers as fewer rows get, a call of the logarithm spills on sm_80 or sm_100.
    return {"BLOCK": 512, "num_warps": 16} if few else {"BLOCK": 1024, "num_warps": 8}  # 4 warps spill on sm_90


def total() -> dict:
    """Of one program's float64 numbers."""
    return {"BLOCK": 2048, "num_warps": 16}


def similarity_sums(width: int, dtype: torch.dtype) -> dict:
    """Log-sum-exps of rows and columns. BM is a multiple of BN."""
    if block := _block_on_chip(width, dtype):
        # Four warps: a thread adds four rows before the columns' sums go through shared memory, with eight only two.
        tile = _tile(rows=128, columns=64, warps=4, stages=2)
        return {"WHOLE": True, "EVEN": width == block, "BLOCK_D": block} | tile
    if dtype.itemsize == 2:
        rows = 64 if chips.current().capability >= 100 else 128  # 128 spill on sm_100, and 128 columns everywhere
        return {"WHOLE": False, "EVEN": False, "BLOCK_D": 64} | _tile(rows=rows, columns=64, warps=8, stages=3)
    warps = 4 if chips.current().capability in (100, 103) else 8  # 8 spill there, 4 on sm_80
    return {"WHOLE": False, "EVEN": False, "BLOCK_D": 32} | _tile(rows=64, columns=64, warps=warps, stages=2)


def similarity_attend(width: int, dtype: torch.dtype, running: bool) -> dict | None:
    """Log-sum-exps and the weighted sum of the candidates; None: `_block_on_chip` has none."""
    block = _block_on_chip(width, dtype)
    if block is None:
        return None
    tile = _tile(rows=64, columns=64, warps=8 if block > 128 or width % 16 else 4, stages=2)  # 4 spill at 40 columns
    if not running and width == block and chips.current().capability == 90:  # 128 rows spill on sm_80
        # Half of the reads of candidates; of 128 columns two programs an SM, which have 128 registers a thread each.
        tile = _tile(rows=128, columns=64, warps=8, stages=2) | ({"maxnreg": 128} if block == 128 else {})
    return {"BLOCK_D": block, "EVEN": width == block} | tile


def similarity_owner(width: int, dtype: torch.dtype, running: bool) -> dict | None:
    """Gradients of rows; None: `_block_on_chip` has none."""
    block = _block_on_chip(width, dtype)
    if block is None:
        return None
    chip = chips.current()
    if not chip.roomy or (running and block > 128 and chip.capability != 90):
        stages = 1 if running and chip.capability >= 120 else 2  # 64 columns, 4 warps, two stages there: spill
        tile = _tile(rows=64, columns=32, warps=8, stages=stages)
    elif block > 128:
        tile = _tile(rows=128, columns=64 if chip.capability >= 90 else 32, warps=8, stages=2)  # 64 spill on sm_80
    else:
        tile = _tile(rows=64, columns=32 if running else 64, warps=4, stages=2)
    return {"BLOCK_D": block, "EVEN": width == block} | tile


def similarity_weights(width: int, dtype: torch.dtype) -> dict:
    if dtype.itemsize == 2:
        columns = 64 if width % 16 else 128  # as in `_block_on_chip`
        return {"BLOCK_D": 64} | _tile(rows=128, columns=columns, warps=8, stages=3)
    return {"BLOCK_D": 32} | _tile(rows=64, columns=64, warps=4, stages=2)


def koleo_neighbors(topk: int) -> dict:
    stages = 2 if topk == 1 else 1  # beside the search for the next best, two stages spill on sm_100
    return {"BLOCK_D": 32} | _tile(rows=64, columns=64, warps=8, stages=stages)


def similarity_visible(width: int, dtype: torch.dtype) -> dict:
    """Log-sum-exps over what rows and columns see; 64 columns spill on sm_80 where all options are there."""
    if block := _block_on_chip(width, dtype):
        return {"WHOLE": True, "BLOCK_D": block} | _tile(rows=64, columns=64, warps=8, stages=2)
    if dtype.itemsize == 2:
        return {"WHOLE": False, "BLOCK_D": 64} | _tile(rows=64, columns=32, warps=8, stages=3)
    return {"WHOLE": False, "BLOCK_D": 32} | _tile(rows=64, columns=32, warps=8, stages=2)


def similarity_visible_owner(width: int, dtype: torch.dtype) -> dict | None:
    """Gradients of what rows see; None: `_block_on_chip` has none."""
    block = _block_on_chip(width, dtype)
    if block is None:
        return None
    if not chips.current().roomy:  # 64 rows spill on sm_86 and sm_120
        return {"BLOCK_D": block} | _tile(rows=32, columns=16, warps=8, stages=2)
    # where all options are there, 32 columns beside rows of 128 spill: two stages on sm_80, three on sm_100
    return {"BLOCK_D": block} | _tile(rows=64, columns=32 if block > 128 else 16, warps=8, stages=2)


def similarity_visible_weights(dtype: torch.dtype) -> dict:
    if dtype.itemsize == 2:
        return {"BLOCK_D": 64} | _tile(rows=64, columns=64, warps=8, stages=3)
    return {"BLOCK_D": 32} | _tile(rows=64, columns=64, warps=8, stages=2)


def similarity_sigmoid(dtype: torch.dtype) -> dict:
    """Half a tile of weights: a logistic loss beside each of them spills in 128 x 128 (46 to 150 instructions)."""
    tile = similarity_weights(0, dtype)
    return tile | {"BN": min(64, tile["BN"])}


def siglip_pairs(dtype: torch.dtype) -> dict:
    """Labels, targets and masks beside a loss and a slope spill in larger tiles."""
    if dtype.itemsize == 2:
        return {"BLOCK_D": 64} | _tile(rows=64, columns=64, warps=8, stages=3)
    return {"BLOCK_D": 32} | _tile(rows=64, columns=32, warps=8, stages=2)


# neighbors ------------------------------------------------------------------------------------------------------------


def kmeans_assign(width: int, dtype: torch.dtype) -> dict:
    """Each row's nearest centroid: the largest of a row's products, of two in half precision."""
    if block := _block_on_chip(width, dtype):
        rows = 128 if block <= 128 or chips.current().roomy else 64
        return {"WHOLE": True, "BLOCK_D": block} | _tile(rows=rows, columns=64, warps=8, stages=2)
    if dtype.itemsize == 2:
        return {"WHOLE": False, "BLOCK_D": 64} | _tile(rows=128, columns=64, warps=8, stages=3)
    return {"WHOLE": False, "BLOCK_D": 32} | _tile(rows=64, columns=64, warps=8, stages=2)


def nearest_k(dtype: torch.dtype) -> dict:
    """A tile of products beside the 32 best of each row."""
    if dtype.itemsize == 2:
        return {"BLOCK_D": 64} | _tile(rows=64, columns=64, warps=4, stages=2)
    columns = 64 if chips.current().roomy else 32  # 64 spill on sm_86 and sm_120
    return {"BLOCK_D": 32} | _tile(rows=64, columns=columns, warps=8, stages=1)  # as koleo_neighbors


def kmeans_sums(width: int) -> dict:
    """32 rows of 128 columns in flight: whole sectors of a gathered row in any dtype."""
    return {"ROWS": 32, "BLOCK": min(128, _block(width)), "num_warps": 4}


# covariance -----------------------------------------------------------------------------------------------------------


def covariance_columns(dtype: torch.dtype) -> dict:
    """16 columns a program: 64 bytes of float32, two whole sectors, and 32 programs for D = 512."""
    return {"ROWS": 128 if dtype == torch.float32 else 64, "COLUMNS": 16, "num_warps": 4}


def covariance_squares(dtype: torch.dtype, both: bool) -> dict:
    """Square tiles, as a tile is written transposed as well; `both`: a program makes those of both views.

    On sm_80 tiles of 128, or 4 warps, spill, and of both views more than 16 columns at a time.
    """
    if dtype == torch.float64 or not chips.current().tensor_cores:
        return {"BM": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    return {"BM": 64, "BLOCK_K": 16 if both else 32, "num_warps": 8, "num_stages": 2}


def covariance_gradient(dtype: torch.dtype) -> dict:
    if dtype == torch.float64:
        return {"BLOCK_K": 16} | _tile(rows=32, columns=32, warps=4, stages=1, summed="BLOCK_K")
    return {"BLOCK_K": 32} | _tile(rows=128, columns=64, warps=8, stages=2, summed="BLOCK_K")  # 128 columns spill


# prototypes -----------------------------------------------------------------------------------------------------------


def row_logsumexp(width: int, dtype: torch.dtype) -> dict:
    """One program a row; half of it at once where it is short, so that padding to a power of two costs little."""
    block = max(128, min(_next_power_of_2(width), 16384 // dtype.itemsize))
    stages = 2 if dtype.itemsize > 2 and chips.current().capability >= 100 else 3  # three spill on sm_100
    return {"BLOCK": block, "num_warps": 16 if block > 2048 else 4, "STAGES": stages}  # 8 warps spill beside a bias


def column_logsumexp(width: int, dtype: torch.dtype) -> dict:
    """Rows of 512 bytes of float32, whole sectors of any input, and enough programs at a few thousand rows.

    Wide rows make programs enough of four times that, so that memory is read in pieces of a kilobyte and more.
    """
    if width >= 16_384:
        return {"PART": 128, "ROWS": 8, "BLOCK": 2048 // dtype.itemsize, "num_warps": 8}
    return {"PART": 128, "ROWS": 16, "BLOCK": 512 // dtype.itemsize, "num_warps": 4}


def sinkhorn_join() -> dict:
    return {"BLOCK": 128, "num_warps": 4}


def sinkhorn_rows(width: int, compute: torch.dtype) -> dict | None:
    """Rows read once, up to 8192 float32, beside potentials and sums (3000: 3 blocks of 1024); None: read twice."""
    tile = _rows(width, per_thread=(64 if chips.current().tensor_cores else 32) // compute.itemsize)  # sm_75 spills 64
    if tile is None or width <= 1024 or width > 3 * tile["BLOCK"] // 4:
        return tile and tile | {"BLOCKS": 1}
    return tile | {"BLOCK": tile["BLOCK"] // 4, "BLOCKS": 3}


def sinkhorn_codes() -> dict:
    return {"ROWS": 1, "BLOCK": 1024, "BLOCKS": 1, "num_warps": 4}


def prototype_cross_entropy(dtype: torch.dtype) -> dict:
    """Eight elements a thread: ten student views and two teacher views are in flight."""
    return {"BLOCK": 4096 // dtype.itemsize, "num_warps": 4}


def teacher_statistics(dtype: torch.dtype) -> dict:
    return {"ROWS": 8, "BLOCK": 512 // dtype.itemsize, "num_warps": 4}


def prototype_head(width: int, dtype: torch.dtype, owner: bool) -> dict:
    """Rows of 256 half-precision numbers and their sum take the registers, their tiles half of the shared memory.

    A block of 64 prototypes would read its rows half as often, and spills 4 to 10 instructions on sm_90 and sm_100.
    Float32 takes three products for one, and their operands as many registers: 64 columns, or 4 warps on sm_80, spill
    in the kernel that owns prototypes (`owner`).
    """
    size = dtype.itemsize
    chip = chips.current()
    largest = {8: 32, 4: 32 if owner else 64, 2: 256 if width <= 256 else 128}[size]
    block = min(largest, _block(width))
    if size == 8:
        tile = _tile(rows=32, columns=16, warps=4, stages=1)
    elif size == 4:
        tile = _tile(rows=32, columns=32, warps=8 if owner else 4, stages=1)
    elif width > block:
        tile = _tile(rows=64, columns=32, warps=8, stages=2)
    elif block > 128 and not chip.roomy:  # 128 rows spill or don't fit, and of 64 rows 8 warps spill on sm_86
        tile = _tile(rows=64, columns=32, warps=4, stages=2)
    else:
        tile = _tile(rows=128, columns=32, warps=8, stages=2)
    tile = {"BLOCK_D": block} | tile
    keep = tile["BM"] * width * size <= min(chip.shared // 2, 1 << 16)  # wider float32 rows spill on sm_90 and sm_100
    if size == 2 and keep and width > block and chip.capability >= 120:
        tile["num_warps"] = 4  # 8 spill
    if size == 2 and not keep and chip.capability < 100:
        tile["num_stages"] = 1  # two spill on sm_86, and one on sm_100
    return tile | {"CHUNKS": -(-width // tile["BLOCK_D"]), "KEEP": keep}


def prototype_head_views(width: int) -> dict:
    block = min(256, max(32, _next_power_of_2(width)))  # more columns of a thread spill on sm_80 and sm_86
    return {"BLOCK": block, "num_warps": 8 if block > 128 else 4 if block > 64 else 1}
