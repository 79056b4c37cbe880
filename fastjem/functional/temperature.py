"""Temperatures that are tensors: learned ones, and schedules that never leave the device.

An operator takes a number, by which it chooses its variant on the host; a tensor's value isn't known there without
waiting for the device. So a tensor goes into what is divided by it, and the operator is given a temperature of 1. The
gradient of a learned temperature is then autograd's, from that of the rows or the scores.
"""

from torch import Tensor
from torch.nn.functional import normalize

from fastjem.functional.precision import in_float32


def over(x: Tensor, temperature: Tensor) -> Tensor:
    """`x / temperature`, in float32 at least: a quotient in half precision would lose what the operator doesn't."""
    wide = in_float32(x)
    return wide / temperature.to(wide.dtype)


def unit_rows_over_root(x: Tensor, temperature: Tensor, unit: bool = True) -> Tensor:
    """Rows [..., D], of unit length if `unit`, over sqrt(temperature): their dot products are over the temperature."""
    wide = in_float32(x)
    if unit:
        wide = normalize(wide, dim=-1)
    return wide * temperature.to(wide.dtype).rsqrt()
