"""Forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad), which no operator has.

PyTorch would not say so: an operator without a derivative of its own drops the tangent, and the result looks constant.
"""

from collections.abc import Iterable

from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad


def refuse_forward_mode(name: str, tensors: Iterable[object]) -> None:
    """Raise where a tensor, or one in a list of them, has a tangent. Outside of forward mode it costs 50 ns."""
    if forward_ad._current_level >= 0:
        _refuse(name, tensors)


def _refuse(name: str, tensors: Iterable[object]) -> None:
    # Within torch.func.jvp a kernel is given plain tensors: which of them had tangents can't be told there any more.
    hidden = eager_transforms.JVP_NESTING > 0
    for x in tensors:
        for tensor in x if isinstance(x, (list, tuple)) else (x,):
            if isinstance(tensor, Tensor) and (hidden or forward_ad.unpack_dual(tensor).tangent is not None):
                raise NotImplementedError(
                    f"{name}: forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is not "
                    "supported; use reverse mode (backward, torch.func.vjp)"
                )
