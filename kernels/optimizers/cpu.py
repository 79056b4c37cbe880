"""The optimisers on the CPU, in C++."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..native import CODES, address, same_layout
from . import reference


def lars_norms(
    parameters: list[Tensor], gradients: list[Tensor], settings: Tensor, groups: list[int], grad_scale: Tensor | None
) -> Tensor:
    gradients = _laid_out_as(parameters, gradients)
    if not _all_laid_out_alike(parameters, gradients):
        return reference.lars_norms(parameters, gradients, settings, groups, grad_scale)
    table = _table([parameters, gradients, (), ()], parameters, gradients, groups)
    settings = settings.contiguous()
    norms = torch.empty(len(parameters), 2, dtype=torch.float64)
    _C.lars_norms(
        table.ctypes.data, len(parameters), settings.data_ptr(), norms.data_ptr(), _unscale(grad_scale),
        torch.get_num_threads(),
    )  # fmt: skip
    return norms


def lars_(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], teachers: list[Tensor], settings: Tensor,
    groups: list[int], norms: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    gradients = _laid_out_as(parameters, gradients)
    if not _all_laid_out_alike(parameters, gradients, buffers, teachers):
        arguments = parameters, gradients, buffers, teachers, settings, groups, norms, grad_scale, found_inf
        return reference.lars_(*arguments)
    table = _table([parameters, gradients, buffers, teachers], parameters, gradients, groups)
    settings = settings.contiguous()
    norms = None if norms is None else norms.contiguous()
    _C.lars(
        table.ctypes.data, len(parameters), settings.data_ptr(), address(norms), _unscale(grad_scale),
        _skipped(found_inf), torch.get_num_threads(),
    )  # fmt: skip


def adamw_(
    parameters: list[Tensor], gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor],
    steps: list[Tensor], teachers: list[Tensor], settings: Tensor, groups: list[int], grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    gradients = _laid_out_as(parameters, gradients)
    if not _all_laid_out_alike(parameters, gradients, averages, squares, teachers):
        rest = settings, groups, grad_scale, found_inf
        return reference.adamw_(parameters, gradients, averages, squares, steps, teachers, *rest)
    lists = [parameters, gradients, averages, squares, steps, teachers]
    table = _table(lists, parameters, gradients, groups)
    settings = settings.contiguous()
    _C.adamw(
        table.ctypes.data, len(parameters), settings.data_ptr(), _unscale(grad_scale), _skipped(found_inf),
        torch.get_num_threads(),
    )  # fmt: skip


def adamw_of_plain(
    parameters: list[Tensor], gradients: list[Tensor], averages: list[Tensor | None], squares: list[Tensor | None],
    steps: list[Tensor], teachers: list[Tensor | None], groups: list[int], settings: Tensor,
) -> bool:  # fmt: skip
    """`adamw_`, where None is a teacher that isn't there and `settings` contiguous. False, and nothing is written,
    where C++ says that a tensor isn't plain, doesn't fit its parameter, or isn't apart from all others.
    """
    lists = parameters, gradients, averages, squares, steps, teachers
    return _C.adamw_of_plain(*lists, groups, settings.data_ptr(), torch.get_num_threads())


def lars_of_plain(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor | None], teachers: list[Tensor | None],
    groups: list[int], settings: Tensor,
) -> bool:  # fmt: skip
    """`lars_`, as `adamw_of_plain` is `adamw_`; None is also a buffer that isn't there."""
    lists = parameters, gradients, buffers, teachers
    return _C.lars_of_plain(*lists, groups, settings.data_ptr(), torch.get_num_threads())


def _laid_out_as(parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The gradients, copied where they aren't laid out as their parameters are."""
    if all(map(Tensor.is_contiguous, parameters)) and all(map(Tensor.is_contiguous, gradients)):
        return gradients
    return [
        g if same_layout(p, g) else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(parameters, gradients, strict=True)
    ]


def _all_laid_out_alike(parameters: list[Tensor], *others: Sequence[Tensor]) -> bool:
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in (parameters, *others)):
        return True
    return all(
        same_layout(p, *(tensors[i] for tensors in others if i < len(tensors))) for i, p in enumerate(parameters)
    )


def _table(
    lists: Sequence[Sequence[Tensor]], parameters: list[Tensor], gradients: list[Tensor], groups: list[int]
) -> np.ndarray:
    """[P, columns] int64, a tensor a line: addresses from the lists (0 beyond a list's end), elements, both dtypes,
    the group.
    """
    table = np.zeros((len(parameters), len(lists) + 4), np.int64)
    for column, tensors in enumerate(lists):
        table[: len(tensors), column] = [x.data_ptr() for x in tensors]
    table[:, -4] = [x.numel() for x in parameters]
    table[:, -3] = [CODES[x.dtype] for x in parameters]
    table[:, -2] = [CODES[x.dtype] for x in gradients]
    table[:, -1] = groups
    return table


def _unscale(grad_scale: Tensor | None) -> float:
    return 1.0 if grad_scale is None else 1 / grad_scale.item()


def _skipped(found_inf: Tensor | None) -> bool:
    return found_inf is not None and found_inf.item() != 0
