"""Plain tensors: torch.Tensor or Parameter itself, in the host's memory, which is there and large enough.

C++ looks at all of them in one call (csrc/tensors.cpp), which takes 0.2 us a tensor. The checks in Python, which tell
what is wrong with the others, take ten times as long. Where the extension isn't built, or torch is older than 2.10, no
tensor is plain, and everything goes the longer way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from . import _C
except ImportError:

    def plain(_arguments: Sequence[object]) -> bool:
        """Whether all tensors among an operator's arguments, and in lists among them, are plain."""
        return False

    def plain_matrices(_tensors: Sequence[Tensor], _dims: int, _same: bool) -> bool:
        """Whether all are plain, floating-point, not empty, of so many dimensions, and of one shape if `same`."""
        return False

    def few_with_labels(_x: Tensor, _labels: Tensor, _ignore_index: int, _most: int) -> bool:
        """Whether x is plain, [N, K] float32 or float64 of at most so many elements, and the labels are, [N] int64.

        In [0, K) or `ignore_index`, and not all of them that.
        """
        return False

    def few_alike(_x: Tensor, _y: Tensor, _most: int) -> bool:
        """Whether both are plain, float32 or float64, of one dtype and shape, and of at most so many elements."""
        return False

    def facts(_targets: list[Tensor], _sources: list[Tensor]) -> bytes | None:
        """Address, end of the storage, dtype, sizes, strides of each, if all are plain: equal where nothing moved."""
        return None

    def rescale(
        _gradients: Sequence[Tensor | None], _upstream: Tensor, _factors: Tensor | Sequence[float], _threads: int
    ) -> bool:
        """`gradient *= upstream * factor` for each, rounded once; False, and nothing is written, if one isn't plain."""
        return False

    def ema_update(_facts: bytes, _momentum: float, _threads: int) -> bool:
        """`ema_update_` of the tensors that the facts are of, teachers first; False, if C++ can't take one of them."""
        return False
else:
    _C.learn_tensors(
        Tensor, torch.nn.Parameter, torch.UntypedStorage, getattr(Tensor, "__dlpack_c_exchange_api__", None)
    )
    plain = _C.plain
    plain_matrices = _C.plain_matrices
    few_with_labels = _C.few_with_labels
    few_alike = _C.few_alike
    facts = _C.facts
    rescale = _C.rescale_plain
    ema_update = _C.ema_update_plain
