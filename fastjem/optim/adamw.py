"""AdamW."""

from typing import Any

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.kernels import guard
from fastjem.ops.autograd import ops
from fastjem.optim.fused import Call, Fused, Gathered

try:
    from fastjem.kernels.optimizers import cpu
except ImportError:  # the extension isn't built
    cpu = None


class AdamW(Fused):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101); torch's, and its state is torch's.

        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        p = (1 - lr * weight_decay) * p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params, lr, weight_decay: as of `SGD`.
        betas: numbers or 0-dim tensors.
        eps: beside the root.

    Raises:
        ValueError: for negative numbers, and betas of 1 or more.
    """

    # Of torch's groups. What is fused or capturable has its steps on the parameter's device when torch loads the state.
    _KEPT = {"amsgrad": False, "maximize": False, "fused": True, "capturable": True}  # noqa: RUF012

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float | Tensor = 1e-2,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **self._KEPT}
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for i, beta in enumerate(group["betas"]):
            value = checks.number("AdamW", f"betas[{i}]", beta, low=0, high=1, inclusive=True)
            if not isinstance(value, Tensor) and value == 1:
                checks.fail("AdamW", f"betas[{i}] must be less than 1", beta)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch's are on the host where it doesn't fuse, float64 where that is the default, and were numbers once.
        for group in self.param_groups:
            group.update(self._KEPT)
            for p in group["params"]:
                state = self.state.get(p)
                if state:
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)

    def _row(self, group: dict[str, Any], teacher_momentum: float | Tensor) -> list[Any]:
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], teacher_momentum]

    def _states_of(self, parameters: list[Tensor], groups: list[int]) -> tuple[list[list[Tensor | None]], list[Tensor]]:
        averages, squares, steps = [], [], []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        return [averages, squares], steps

    def _update(self, call: Call, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        with guard.checked_already():
            ops.adamw_(
                call.local, call.gradients(), *call.states, call.steps,
                call.teachers, settings, call.groups, grad_scale, found_inf,
            )  # fmt: skip

    def _update_at_once(self, step: Gathered, teachers: list[Tensor | None], settings: Tensor) -> bool:
        if cpu is None:
            return False
        averages, squares = step.states
        return cpu.adamw_of_plain(
            step.parameters, step.gradients, averages, squares, step.steps, teachers, step.groups, settings
        )
