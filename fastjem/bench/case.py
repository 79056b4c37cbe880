"""A benchmark case: inputs, the same computation by several hands, and what it costs at the least."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjem.bench.clocks import Call, copied
from fastjem.bench.timing import WrongResult
from fastjem.kernels.arithmetic import widest_dtype

# Relative error, norm over norm, against the eager formula in float64 on the same inputs. Float32: rounding of sums
# and, in Gram forms, cancellation. Half precision: 2^-9 per rounding of bfloat16, and eager code rounds several times
# in a row. Pixels: a level of 255 in a few of them.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.uint8: 3e-3}

# Shapes of runs on a small data set or a small machine: `--full` alone, as there is one for each loss and dtype.
SMALL: dict[str, Any] = {"devices": ("cpu",), "full_only": ("cpu",)}


@dataclass(frozen=True)
class Case:
    """One row of the table. All variants take the same inputs and return the same, which is then differentiated."""

    op: str  # its name in kernels/, csrc/ and tests/; a loss without operator: in fastjem.functional
    shape: str
    inputs: Callable[["Draw"], tuple]  # differentiated for those that require a gradient
    eager: Callable  # plain torch, as a user would write it; torch.compile gets the same
    ours: Callable
    bytes: int  # read and written at the least: inputs, results, gradients once, and passes that no algorithm avoids
    flops: int = 0  # of matrix products at the least, forward and backward
    peers: Mapping[str, Callable[[], Callable]] = field(default_factory=dict)  # package -> imports and makes it
    dtype: torch.dtype = torch.float32
    loops: tuple[str, ...] = ()  # peers that go through the batch in Python: minutes on a GPU, where it is large
    compiled: Callable[[], Callable] | None = None  # makes torch.compile's variant, where it can't take `eager` whole
    compiles: bool = True  # False: there is no such variant, as of an optimiser's step, whose compile takes minutes
    uses: tuple[str, ...] = ()  # further operators that `ours` consists of
    devices: tuple[str, ...] = ("cpu", "cuda")
    full_only: tuple[str, ...] = ()  # devices on which only `--full` runs it, because it takes too long
    clock: str = "device"  # or "host": the overhead of a call

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"

    def draw(self, device: torch.device) -> tuple:
        """The inputs, the same ones at each call."""
        return self.inputs(Draw(device, self.dtype))

    def variants(self, compiled: bool = True, loops: bool = True) -> tuple[dict[str, Callable], dict[str, str]]:
        """Name -> function of the inputs, eager first and ours last; and, for peers that can't be had, why.

        `loops`: those that go through the batch in Python, too.
        """
        functions = {"eager": self.eager}
        absent = {}
        if compiled and self.compiles:
            functions["compile"] = self.compiled() if self.compiled else torch.compile(self.eager, dynamic=False)
        for package, load in self.peers.items():
            if package in self.loops and not loops:
                absent[package] = "left out (it goes through the batch in Python; --loops times it)"
                continue
            try:
                functions[package] = load()
            except ImportError as error:
                absent[package] = f"not installed ({error})"
        functions["ours"] = self.ours
        return functions, absent

    def verifier(self, inputs: tuple) -> Callable[[list[Tensor]], None]:
        """Raises WrongResult unless result and gradients equal those of the eager formula on float64 inputs.

        In float32 the formula can be further from the truth than what it judges: the coding rate's gradient, for 256
        rows of 2048 dimensions, was off by 30 % with one CPU's linear algebra, and by 0.0015 % with another's.
        """
        oracle = widest_dtype(device_of(inputs))
        expected = Call(self.eager, copied(inputs, oracle)).outputs()
        tolerance = TOLERANCES[self.dtype]

        def verify(outputs: list[Tensor]) -> None:
            if len(outputs) != len(expected):
                raise WrongResult(f"{len(outputs)} results and gradients instead of {len(expected)}")
            for i, (result, truth) in enumerate(zip(outputs, expected, strict=True)):
                truth = truth.to(oracle).flatten()
                error = (result.to(oracle).flatten() - truth).norm() / truth.norm().clamp_min(1e-30)
                if not error <= tolerance:  # NaN isn't
                    raise WrongResult(f"result {i} differs from the eager formula's by {error:.1e} of its norm")

        return verify


class Draw:
    """Random inputs on the device; the same numbers for the same sequence of calls."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = torch.device(device)
        self.dtype = dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(
        self, *shape: int, scale: float = 1.0, gradient: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)
        return x.mul_(scale).requires_grad_(gradient)

    def labels(self, count: int, classes: int) -> Tensor:
        return torch.randint(classes, (count,), generator=self.generator, device=self.device)

    def pair(self, n: int, d: int, gradients: tuple[bool, bool] = (True, True)) -> tuple[Tensor, Tensor]:
        """Two views of n embeddings: alike, as they are in training (cosine about 0.7)."""
        first = self.normal(n, d)
        second = first + self.normal(n, d)
        return first.requires_grad_(gradients[0]), second.requires_grad_(gradients[1])


def device_of(tree: Any) -> torch.device:
    """Where the first tensor of nested tuples and lists is."""
    while not isinstance(tree, Tensor):
        tree = tree[0]
    return tree.device


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision widened, and float64 left as it is: an eager formula is the oracle of its case, too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "uint8"}[dtype]
