"""LARS, SGD and AdamW that update all parameters in one pass, and the momentum copy of the network (the teacher) with
them: one read and one write of each parameter for both.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.checks import PLAIN
from fastjem.functional.memory import check_update
from fastjem.functional.weights import ema_update_
from fastjem.kernels import guard
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.optim.sharded import Sharding, local, sharding_of, sum_over_shards
from fastjem.ops.autograd import ops


class _Call(NamedTuple):
    """One call of the operator: parameters on one device, sharded alike. What they are made of doesn't change while
    addresses don't.
    """

    parameters: list[Tensor]  # as the optimiser has them; the others are this rank's shards
    local: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor]]  # as `Fused._states_of` gives them
    teachers: list[Tensor]  # of the first parameters
    groups: list[int]
    sharding: Sharding | None


class _Plan(NamedTuple):
    addresses: tuple
    calls: list[_Call]
    rest: list[tuple[Tensor, Tensor]]  # teachers and students that no operator of the optimiser takes


class Fused(torch.optim.Optimizer):
    """What LARS, SGD and AdamW share: gathering tensors, the teacher, DTensors, checks before anything is written."""

    _step_supports_amp_scaling = True  # torch's GradScaler then gives `grad_scale` and `found_inf`, and looks at neither
    _adapts = 0

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._pairs: dict[Tensor, Tensor] = {}  # student -> teacher
        self._others: list[tuple[Tensor, Tensor]] = []  # teacher and student, where another teacher has the student
        self._teacher_momentum: float | Tensor = 0.0
        self._plan: _Plan | None = None
        self._settings: dict[torch.device, tuple[list, Tensor]] = {}
        self._captured: list[Tensor] = []  # settings that a CUDA graph reads at every replay, so they are never freed
        super().__init__(params, defaults)
        for group in self.param_groups:
            self._check(group)

    def attach_teacher(
        self, teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float | Tensor = 0.99
    ) -> None:
        """From now on every step ends with `teacher = momentum * teacher + (1 - momentum) * student`.

        The same numbers, to the last bit, as `fastjem.functional.ema_update_` behind the step. Students that the
        optimiser doesn't have, and those without a gradient, are followed too. A second call replaces the first one.
        The teacher belongs to the model: `state_dict` has nothing of it.

        Args:
            teacher, student: as `ema_update_` takes them.
            momentum: of steps that aren't given another one (`step(teacher_momentum=...)`).

        Raises:
            ValueError: as `ema_update_` does.
        """
        op = type(self).__name__
        teacher, student = list(teacher), list(student)
        if len(teacher) != len(student):
            checks.fail(op, "teacher and student must be as many tensors", f"{len(teacher)} and {len(student)}")
        pairs: dict[Tensor, Tensor] = {}
        others: list[tuple[Tensor, Tensor]] = []
        for t, s in zip(teacher, student, strict=True):
            if t.shape != s.shape:
                checks.fail(op, "teacher and student must have the same shapes", f"{tuple(t.shape)}, {tuple(s.shape)}")
            if s in pairs or t.dtype != s.dtype:
                others.append((t, s))
            else:
                pairs[s] = t
        if pairs:
            checks.number(op, "teacher momentum", momentum, low=0, high=1, inclusive=True)
        self._pairs, self._others, self._teacher_momentum, self._plan = pairs, others, momentum, None

    @torch.compiler.disable
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, teacher_momentum: float | Tensor | None = None
    ) -> Any:
        """One step; parameters without a gradient are left out.

        Args:
            closure: computes the loss again, with gradients, and returns it.
            teacher_momentum: in place of the one given to `attach_teacher`; a number or a 0-dim tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        momentum = self._teacher_momentum if teacher_momentum is None else teacher_momentum
        if teacher_momentum is not None and (self._pairs or self._others):
            checks.number(type(self).__name__, "teacher momentum", momentum, low=0, high=1, inclusive=True)
        plan = self._planned()
        for call in plan.calls:
            settings = self._settings_on(call.local[0].device, momentum)
            self._update(call, settings, *self._scaler_on(call.local[0].device))
            written = (call.parameters, call.teachers, *call.states)
            torch.autograd.graph.increment_version([x for tensors in written for x in tensors])
        if plan.rest:
            ema_update_([teacher for teacher, _ in plan.rest], [student for _, student in plan.rest], momentum)
        return loss

    def _planned(self) -> _Plan:
        """The calls of this step: the last step's, where every tensor is where it was then."""
        parameters: list[Tensor] = []
        groups: list[int] = []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout is not torch.strided:
                        checks.fail(type(self).__name__, "gradients must be dense", p.grad.layout)
                    parameters.append(p)
                    groups.append(number)
        gradients = [p.grad for p in parameters]
        states = self._states_of(parameters, groups)
        every = [*parameters, *gradients, *(x for one in states for x in one if x is not None), *self._pairs.values()]
        plain = PLAIN.issuperset(map(type, every))
        if not plain:
            every = [local(x) for x in every]
        # Of gradients, which are new at each step, also what a kernel trusts beside the address.
        of_gradients = [(g.dtype, g.shape, g.stride()) for g in every[len(parameters) : 2 * len(parameters)]]
        addresses = (tuple(map(Tensor.data_ptr, every)), of_gradients, groups, [p.numel() for p in parameters])
        if self._plan is None or self._plan.addresses != addresses:
            self._plan = self._new_plan(addresses, parameters, gradients, groups, states)
        return self._plan

    def _new_plan(
        self, addresses: tuple, parameters: list[Tensor], gradients: list[Tensor], groups: list[int],
        states: list[list[Tensor | None]],
    ) -> _Plan:  # fmt: skip
        """Calls by device, sharding and whether there is momentum; checked before anything is written."""
        op = type(self).__name__
        by_kind: dict[tuple, list[int]] = {}
        for i, p in enumerate(parameters):
            if p.dtype not in (torch.float32, torch.float64):
                checks.fail(op, "parameters must be float32 or float64 (half precision rounds updates away)", p.dtype)
            sharding = sharding_of(op, p, gradients[i], self._pairs.get(p))
            has_states = tuple(one[i] is not None for one in states)
            by_kind.setdefault((p.device, sharding, has_states), []).append(i)
        calls = []
        for (_, sharding, has_states), members in by_kind.items():
            members.sort(key=lambda i: parameters[i] not in self._pairs)  # those with a teacher first, as they stood
            chosen = [parameters[i] for i in members]
            calls.append(
                _Call(
                    chosen,
                    [local(p) for p in chosen],
                    [local(gradients[i]) for i in members],
                    [[local(one[i]) for i in members] if has else [] for one, has in zip(states, has_states, strict=True)],
                    [local(self._pairs[p]) for p in chosen if p in self._pairs],
                    [groups[i] for i in members],
                    sharding,
                )
            )
        for device in {call.local[0].device for call in calls}:
            targets, sources = [], []
            for call in calls:
                if call.local[0].device == device:
                    for one in (call.local, *call.states, call.teachers):
                        targets += one
                        sources += call.gradients[: len(one)]
            check_update(op, targets, sources)
        updated = set(parameters)
        rest = [(t, s) for s, t in self._pairs.items() if s not in updated] + self._others
        return _Plan(addresses, calls, rest)

    def _settings_on(self, device: torch.device, teacher_momentum: float | Tensor) -> Tensor:
        """[G, columns] on a device. Numbers, and tensors on the host, are copied there when they have changed; what is
        a tensor there already never visits the host.
        """
        rows: list[list[float]] = []
        tensors: list[tuple[int, int, Tensor]] = []
        for i, group in enumerate(self.param_groups):
            row = self._row(group, teacher_momentum)
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    if value.device.type == "cpu":
                        row[j] = value.item()
                    else:
                        tensors.append((i, j, value))
                        row[j] = 0.0
            rows.append(row)
        kept = self._settings.get(device)
        if kept is None or kept[0] != rows:
            host = torch.tensor(rows, dtype=widest_dtype(device))
            if device.type == "cuda":
                host = host.pin_memory()
            kept = self._settings[device] = (rows, host.to(device, non_blocking=True))
        settings = kept[1]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(settings)
        if tensors:
            settings = settings.clone()
            for i, j, value in tensors:
                settings[i, j].copy_(value.reshape(()), non_blocking=True)
        return settings

    def _scaler_on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """torch's GradScaler sets both for the time of a step."""
        both = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return tuple(x if x is None else x.to(device) for x in both)  # pyright: ignore[reportReturnType]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._plan = None
        for group in self.param_groups:
            self._check(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._check(self.param_groups[-1])

    # Of each optimiser:

    def _check(self, group: dict[str, Any]) -> None:
        """ValueError for a group that it can't be given."""
        op = type(self).__name__
        for name in ("amsgrad", "maximize", "dampening", "differentiable"):  # of a state that torch or timm have saved
            if group.get(name):
                checks.fail(op, f"there is no {name}", group[name])
        for name in ("lr", "weight_decay", "eps"):
            if name in group:
                checks.number(op, name, group[name], low=0, inclusive=True)

    def _row(self, group: dict[str, Any], teacher_momentum: float | Tensor) -> list[Any]:
        """A group's line of the settings."""
        raise NotImplementedError

    def _states_of(self, parameters: list[Tensor], groups: list[int]) -> list[list[Tensor | None]]:
        """Lists of what has a parameter's shape, a tensor a parameter, made where there is none yet; None: it needs none."""
        raise NotImplementedError

    def _update(self, call: _Call, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        raise NotImplementedError


class _Momentum(Fused):
    """SGD with momentum, whose rate LARS adapts to each tensor."""

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        op = type(self).__name__
        momentum = checks.number(op, "momentum", group["momentum"], low=0, inclusive=True)
        if group["nesterov"] and not isinstance(momentum, Tensor) and momentum == 0:
            checks.fail(op, "nesterov needs a momentum", momentum)

    def _states_of(self, parameters: list[Tensor], groups: list[int]) -> list[list[Tensor | None]]:
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
        return [buffers]

    def _update(self, call: _Call, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        norms = None
        with guard.checked_already():
            if call.sharding is not None and self._adapts:
                norms = ops.lars_norms(call.local, call.gradients, settings, call.groups, grad_scale)
        if norms is not None and call.sharding is not None:
            norms = sum_over_shards(norms, call.sharding)
        with guard.checked_already():
            ops.lars_(
                call.local, call.gradients, call.states[0], call.teachers, settings, call.groups, norms, grad_scale,
                found_inf,
            )  # fmt: skip


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

    _adapts = 0

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

    _adapts = 1

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

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float | Tensor = 1e-2,
    ):  # fmt: skip
        # What is fused or capturable has its steps on the parameter's device when a state is loaded.
        kept = {"amsgrad": False, "maximize": False, "fused": True, "capturable": True}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **kept}
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for i, beta in enumerate(group["betas"]):
            value = checks.number("AdamW", f"betas[{i}]", beta, low=0, high=1, inclusive=True)
            if not isinstance(value, Tensor) and value == 1:
                checks.fail("AdamW", f"betas[{i}] must be less than 1", beta)

    def _row(self, group: dict[str, Any], teacher_momentum: float | Tensor) -> list[Any]:
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], teacher_momentum]

    def _states_of(self, parameters: list[Tensor], groups: list[int]) -> list[list[Tensor | None]]:
        averages, squares = [], []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
        return [averages, squares]

    def _update(self, call: _Call, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        with guard.checked_already():
            ops.adamw_(
                call.local, call.gradients, *call.states, [self.state[p]["step"] for p in call.parameters],
                call.teachers, settings, call.groups, grad_scale, found_inf,
            )  # fmt: skip
