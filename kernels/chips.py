"""The GPU that a tile is chosen for (tiling.py): what it multiplies with, and how much memory a program may have.

Both are facts of a device. Nothing is tried, and no name of a product is looked for. Where there is no GPU (Triton's
interpreter, counted launches) the choice is an H200's. A chip that isn't in SHARED gets what runs on every chip since
Ampere; `standing_in` puts another one in the place of the device, to compile for it.

How many multiprocessors a chip has decides the order of sums, and so their bits, in one place alone: InfoNCE's walk
over a bank (contrastive/gpu_queries.py). Elsewhere work is shared among as many programs on every chip.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

KIB = 1024
# Bytes of shared memory that one program may ask for, by compute capability (CUDA's programming guide, "maximum amount
# of shared memory per thread block"). Triton compiles programs that want more; they fail when they are launched.
SHARED = {
    75: 64 * KIB,  # T4
    80: 163 * KIB,  # A100
    86: 99 * KIB,  # A10, RTX 3090
    87: 163 * KIB,  # Orin
    89: 99 * KIB,  # L4, L40, RTX 4090
    90: 227 * KIB,  # H100, H200
    100: 227 * KIB,  # B200
    103: 227 * KIB,  # B300
    120: 99 * KIB,  # RTX 5090, RTX PRO 6000
    121: 99 * KIB,  # GB10
}
RESERVED = KIB  # of a multiprocessor's shared memory, for each program: since compute capability 8.0


@dataclass(frozen=True)
class Chip:
    capability: int  # 90: compute capability 9.0
    shared: int  # bytes of shared memory that one program may have
    multiprocessors: int = 132  # an H100's, an H200's

    @property
    def tensor_cores(self) -> bool:
        """Whether Triton multiplies matrices on them. Below 8.0 it compiles products to multiply-adds in registers."""
        return self.capability >= 80

    @property
    def roomy(self) -> bool:
        """Whether a program may have what it may on an A100."""
        return self.shared >= SHARED[80]

    @classmethod
    def of(cls, capability: int, shared_of_multiprocessor: int | None = None, multiprocessors: int = 132) -> "Chip":
        """The chip of a compute capability, and of the shared memory of one of its multiprocessors if that is known."""
        shared = SHARED.get(capability, SHARED[86 if capability >= 80 else 75])
        if shared_of_multiprocessor is not None:
            shared = min(shared, shared_of_multiprocessor - (RESERVED if capability >= 80 else 0))
        return cls(capability, shared, multiprocessors)


_stand_in: Chip | None = None


@contextlib.contextmanager
def standing_in(chip: Chip) -> Iterator[None]:
    """Within it `current` is this chip."""
    global _stand_in
    before = _stand_in
    _stand_in = chip
    try:
        yield
    finally:
        _stand_in = before


def current() -> Chip:
    """That of the current device, which is the tensors' while an operator runs (`fastjem.ops.triton_launcher`)."""
    if _stand_in is not None:
        return _stand_in
    if not torch.cuda.is_initialized():  # no tensor is on a GPU
        return Chip.of(90)
    return of_device(torch.cuda.current_device())


def product_tile(*, rows: int, columns: int, warps: int, stages: int, summed: str = "BLOCK_D") -> dict:
    """A tile of a product. Without tensor cores a thread holds whole rows of operands: 16 numbers at a time of those
    that a product adds, whose block is the kernel's argument `summed`.
    """
    if not current().tensor_cores:
        return {summed: 16, "BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": rows, "BN": columns, "num_warps": warps, "num_stages": stages}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether cuBLAS multiplies matrices of a 16-bit dtype into float32 on the current chip: bfloat16 since 8.0."""
    return dtype != torch.bfloat16 or current().tensor_cores


@functools.cache
def of_device(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Chip.of(capability, properties.shared_memory_per_multiprocessor, properties.multi_processor_count)
