"""In which dtype losses compute: float32 at least, whatever autocast says; float64 for float64."""

import torch
from torch import Tensor


def loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_float32(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32: sums and factorisations have no digits to give away."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> torch.autocast:
    """Around products, and around `cat` and `stack`: these refuse half precision that isn't autocast's own."""
    return torch.autocast(x.device.type, enabled=False)
