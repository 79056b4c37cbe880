"""What every CPU launcher needs of a tensor: its dtype's code, its address, dense rows."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _rows(x: Tensor) -> Tensor:
    """[N, D] with dense rows; the rows themselves may be anywhere."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _gradient(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype) if wanted else x.new_empty(0)


def _address(x: Tensor) -> int:
    return x.data_ptr()  # 0 for an empty tensor: no gradient wanted


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _flat(*tensors: Tensor) -> bool:
    """Whether the same index into each one's memory is the same element of each: one block, in one order."""
    return all(x.is_contiguous() for x in tensors) or (
        tensors[0].dim() == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    )
