"""What a call would have a GPU do, counted without one: Triton's launches, torch's, and waits of the host.

Tensors are the host's, but every operator of fastjem goes to its Triton launcher, whose launches are noted and don't
happen: results are whatever memory held. So nothing may depend on values; an operator that asks for one is a wait.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjem.kernels import launch
from fastjem.ops import OPERATORS, direct, plain, triton_launcher

# Of memory alone. What only looks at a tensor another way is told by its schema.
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "resize_",
    "set_", "lift_fresh", "is_same_size", "_has_compatible_shallow_copy_type", "record_stream",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2", "item"}
# How many kernels CUDA runs for an operator of several steps, at least.
STEPS = {"logsumexp": 5, "linalg_vector_norm": 1, "std": 1, "logaddexp": 1}


class Launches(TorchDispatchMode):
    """`triton` and `torch`: how often each kernel or operator was launched; `waits`: what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: Counter[str] = Counter()
        self.torch: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.triton.total() + self.torch.total()

    def __str__(self) -> str:
        parts = {"Triton": self.triton, "torch": self.torch, "waits": self.waits}
        return "; ".join(f"{name} {sum(of.values())} {dict(of)}" for name, of in parts.items())

    def launched(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, device_of: Any, **meta: Any) -> None:
        launch.check_grid(grid)
        name = getattr(kernel, "fn", kernel).__name__
        self.triton[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fastjem" and OPERATORS[name].gpu:
            implementation = triton_launcher(name)[0]
            assert implementation is not None and not kwargs
            with self:  # what the launcher does with torch is counted, too
                return plain(implementation, name)(*args)
        if namespace == "fastjem":
            with self:
                return func(*args, **kwargs or {})
        if name in WAITS:
            self.waits[name] += 1
        elif name not in NO_LAUNCH and not _is_view(func):
            self.torch[name] += STEPS.get(name, 1)
        return func(*args, **kwargs or {})


def _is_view(func: Any) -> bool:
    returned = [x.alias_info for x in func._schema.returns]
    return bool(returned) and all(x is not None and not x.is_write for x in returned)


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """What happens within, forward and backward: backward runs on this thread, as tensors are the host's."""
    found = Launches()
    with direct.off(), mock.patch.object(launch, "launch", found.launched), found:
        yield found
