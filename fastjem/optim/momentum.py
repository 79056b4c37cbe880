"""SGD with momentum, and LARS, which adapts its rate to each tensor."""

from typing import Any

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.kernels import guard
from fastjem.ops.autograd import ops
from fastjem.optim.fused import Call, Fused, Gathered
from fastjem.optim.sharded import sum_over_shards

try:
    from fastjem.kernels.optimizers import cpu
except ImportError:  # the extension isn't built
    cpu = None


class _Momentum(Fused):
    """SGD with momentum, whose rate LARS adapts to each tensor."""

    _adapts = False

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        op = type(self).__name__
        momentum = checks.number(op, "momentum", group["momentum"], low=0, inclusive=True)
        if group["nesterov"] and not isinstance(momentum, Tensor) and momentum == 0:
            checks.fail(op, "nesterov needs a momentum", momentum)

    def _states_of(self, parameters: list[Tensor], groups: list[int]) -> tuple[list[list[Tensor | None]], list[Tensor]]:
        buffers: list[Tensor | None] = []
        has_momentum = [isinstance(group["momentum"], Tensor) or group["momentum"] != 0 for group in self.param_groups]
        for p, group in zip(parameters, groups, strict=True):
            if not has_momentum[group]:
                buffers.append(None)
                continue
            state = self.state[p]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            buffers.append(buffer)
        return [buffers], []

    def _update(self, call: Call, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        norms = None
        gradients = call.gradients()
        with guard.checked_already():
            if call.sharding is not None and self._adapts:
                norms = ops.lars_norms(call.local, gradients, settings, call.groups, grad_scale)
        if norms is not None and call.sharding is not None:
            norms = sum_over_shards(norms, call.sharding)
        with guard.checked_already():
            ops.lars_(
                call.local, gradients, call.states[0], call.teachers, settings, call.groups, norms, grad_scale,
                found_inf,
            )  # fmt: skip

    def _update_at_once(self, step: Gathered, teachers: list[Tensor | None], settings: Tensor) -> bool:
        if cpu is None:
            return False
        (buffers,) = step.states
        return cpu.lars_of_plain(step.parameters, step.gradients, buffers, teachers, step.groups, settings)


class SGD(_Momentum):
    """`p -= lr * b`, with `b = momentum * b + g + weight_decay * p`; nesterov: `p -= lr * (g + weight_decay * p +
    momentum * b)`. torch's, in one pass, and its state is torch's.

    Args:
        params: parameters or groups of them, float32 or float64. DTensors are updated shard by shard.
        lr, momentum, weight_decay: numbers or 0-dim tensors. What is on the parameters' device is never read on the
            host, so that schedules need no synchronisation and CUDA graphs follow them.
        nesterov: see above.

    Raises:
        ValueError: for negative numbers.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, *, momentum: float | Tensor = 0.0,
        weight_decay: float | Tensor = 0.0, nesterov: bool = False,
    ):  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "dampening": 0}
        super().__init__(params, defaults)

    def _row(self, group: dict[str, Any], teacher_momentum: float | Tensor) -> list[Any]:
        given = group["lr"], group["momentum"], group["weight_decay"], teacher_momentum
        return [*given, 0.0, 0.0, float(group["nesterov"]), 0.0, 0.0, 0.0]


class LARS(_Momentum):
    """SGD with momentum whose rate is adapted to each tensor (You et al. 2017, arXiv 1708.03888, equation 6):

        ratio = trust_coeff * |p| / (|g| + weight_decay * |p| + eps)
        b = momentum * b + ratio * (g + weight_decay * p);  p -= lr * b

    The names and numbers of timm's `Lars`, and its state. Groups without weight decay (biases, norms) aren't adapted,
    as SimCLR, BYOL and VICReg leave them out; nor are tensors of zeros, or with a gradient of zeros. Norms of DTensors
    are those of the whole parameter: each rank sums its shard, and one small all-reduce a step adds them.

    Args:
        params, lr, momentum, weight_decay, nesterov: as of `SGD`.
        trust_coeff: 0.001, as in SimCLR's and BYOL's code.
        eps: beside the norms.
        trust_clip: rates are only made smaller (LARC): `ratio = min(ratio / lr, 1)`.
        always_adapt: groups without weight decay too.
        decay_in_norm: `|g + weight_decay * p|` in place of `|g| + weight_decay * |p|`, as the code of SimCLR, BYOL and
            Barlow Twins has it.

    Raises:
        ValueError: for negative numbers.
    """

    _adapts = True

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, *, momentum: float | Tensor = 0.9,
        weight_decay: float | Tensor = 0.0, nesterov: bool = False, trust_coeff: float | Tensor = 0.001,
        eps: float = 1e-8, trust_clip: bool = False, always_adapt: bool = False, decay_in_norm: bool = False,
    ):  # fmt: skip
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "dampening": 0,
            "trust_coeff": trust_coeff, "eps": eps, "trust_clip": trust_clip, "always_adapt": always_adapt,
            "decay_in_norm": decay_in_norm,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _row(self, group: dict[str, Any], teacher_momentum: float | Tensor) -> list[Any]:
        given = group["lr"], group["momentum"], group["weight_decay"], teacher_momentum
        flags = group["nesterov"], 2 if group["always_adapt"] else 1, group["trust_clip"], group["decay_in_norm"]
        return [*given, group["trust_coeff"], group["eps"], *map(float, flags)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decay_in_norm", False)  # timm's has none
