"""The specification of what happens to gradients and weights; conventions are in kernels/__init__.py."""

from torch import Tensor

from ..arithmetic import widen, widest


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """`gradient *= factor` in float32, rounded once (torch rounds a 0-dim CUDA factor to float16 first)."""
    gradient.copy_(widen(gradient) * factor)


def rescale_all_(gradients: list[Tensor], upstream: Tensor, scale: Tensor) -> None:
    """`rescale_(gradient, upstream * scale)` for each."""
    for gradient in gradients:
        rescale_(gradient, upstream * scale)


def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: Tensor) -> None:
    """`teacher = momentum * teacher + (1 - momentum) * student`, in place, for each pair of tensors."""
    for t, s in zip(teacher, student, strict=True):
        t.lerp_(s.to(t.dtype), (1 - widest(momentum)).to(t.dtype))
