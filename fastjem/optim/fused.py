"""What LARS, SGD and AdamW share: they update all parameters in one pass, and the momentum copy of the network (the
teacher) with them, by one read and one write of each parameter for both.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.checks import PLAIN
from fastjem.functional.memory import are_apart, check_update, spans
from fastjem.functional.shards import local
from fastjem.functional.weights import ema_update_
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.ops.direct import nothing_watches
from fastjem.optim.sharded import Sharding, sharding_of

WIDE = (torch.float32, torch.float64)


class Call(NamedTuple):
    """One call of the operator: parameters on one device, sharded alike. What they are made of doesn't change while
    addresses don't. Gradients aren't kept: nothing but the parameters may hold their memory between two steps.
    """

    parameters: list[Tensor]  # as the optimiser has them; the others are this rank's shards
    local: list[Tensor]
    states: list[list[Tensor]]  # as `Fused._states_of` gives them
    steps: list[Tensor]  # of AdamW, 0-dim
    teachers: list[Tensor]  # of the first parameters
    groups: list[int]
    sharding: Sharding | None

    def gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters if p.grad is not None]


class Gathered(NamedTuple):
    """What a step has, in lists with an entry a parameter that has a gradient."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    groups: list[int]
    states: list[list[Tensor | None]]  # as `Fused._states_of` gives them
    steps: list[Tensor]


class _Plan(NamedTuple):
    addresses: tuple  # of all but gradients, and the gradients' dtypes and layouts
    written: tuple[np.ndarray, np.ndarray]  # `memory.spans` of all that is
    calls: list[Call]
    rest: list[tuple[Tensor, Tensor]]  # teachers and students that no operator of the optimiser takes


class Fused(torch.optim.Optimizer):
    """An optimiser in one operator: tensors are gathered, and checked before anything is written. See `LARS`.

    Subclasses say what a group's settings are, which states there are, and what is called.
    """

    # torch's GradScaler then gives `grad_scale` and `found_inf`, and looks at neither.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        self._pairs: dict[Tensor, Tensor] = {}  # student -> teacher
        self._others: list[tuple[Tensor, Tensor]] = []  # teacher and student, where another teacher has the student
        self._teacher_momentum: float | Tensor = 0.0
        self._plan: _Plan | None = None
        self._settings: dict[torch.device, tuple[list, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_pairs" not in self.__dict__:  # a copy, or one from a pickle, which has no teacher
            self._begin()

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
            if not (isinstance(t, Tensor) and isinstance(s, Tensor)):
                checks.fail(op, "teacher and student must be tensors", f"{type(t).__name__} and {type(s).__name__}")
            if t.dtype not in WIDE:
                checks.fail(op, "a teacher must be float32 or float64 (half precision rounds updates away)", t.dtype)
            if t.shape != s.shape:
                checks.fail(op, "teacher and student must have the same shapes", f"{tuple(t.shape)}, {tuple(s.shape)}")
            if s in pairs or t.dtype != s.dtype:
                others.append((t, s))
            else:
                pairs[s] = t
        if pairs or others:
            checks.number(op, "teacher momentum", momentum, low=0, high=1, inclusive=True)
        self._pairs, self._others, self._teacher_momentum, self._plan = pairs, others, momentum, None

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
        with torch.no_grad():
            self._take(momentum)  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    @torch.compiler.disable
    def _take(self, momentum: float | Tensor) -> None:
        step = self._gathered()
        if self._plan is not None and self._taken_at_once(step, momentum):
            return
        plan = self._planned(step)
        for call in plan.calls:
            settings = self._settings_on(call.local[0].device, momentum)
            self._update(call, settings, *self._scaler_on(call.local[0].device))
            written = (call.parameters, call.teachers, *call.states)
            torch.autograd.graph.increment_version([x for tensors in written for x in tensors])
        if plan.rest:
            ema_update_([teacher for teacher, _ in plan.rest], [student for _, student in plan.rest], momentum)

    def _gathered(self) -> Gathered:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        groups: list[int] = []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if (gradient := p.grad) is not None:
                    parameters.append(p)
                    gradients.append(gradient)
                    groups.append(number)
        return Gathered(parameters, gradients, groups, *self._states_of(parameters, groups))

    def _taken_at_once(self, step: Gathered, momentum: float | Tensor) -> bool:
        """Whether one call of C++ looked at all tensors and took the step: plain ones, all apart, on the host.

        What is remembered of them isn't needed: to compare with it takes as long. A first step never comes here, as
        what the dispatcher knows alone (inference tensors) has to be asked once.
        """
        parameters = step.parameters
        if not parameters or not parameters[0].is_cpu or not nothing_watches():
            return False
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return False
        teachers: list[Tensor | None] = []
        if self._pairs:
            teachers = [self._pairs.get(p) for p in parameters]
        following = sum([teacher is not None for teacher in teachers])
        if self._others or following < len(self._pairs):
            return False  # a teacher follows somebody whom this step doesn't move
        settings = self._settings_on(parameters[0].device, momentum)
        if not self._update_at_once(step, teachers, settings):
            return False
        written = (parameters, *step.states, teachers)
        torch.autograd.graph.increment_version([x for one in written for x in one if x is not None])
        return True

    def _planned(self, step: Gathered) -> _Plan:
        """The calls of this step: the last step's, where every tensor is where it was then.

        But gradients, which `zero_grad` makes new at each step: they need only be apart from what is written.
        """
        parameters, gradients, groups, states, steps = step
        for gradient in gradients:
            if gradient.layout is not torch.strided:
                checks.fail(type(self).__name__, "gradients must be dense", gradient.layout)
        kept = [*parameters, *self._pairs.values(), *steps]
        for one in states:
            kept += [x for x in one if x is not None]
        own, new = kept, gradients
        if not PLAIN.issuperset(map(type, [*kept, *gradients])):
            own, new = [local(x) for x in kept], [local(x) for x in gradients]
        of_gradients = [(g.dtype, g.shape, g.stride()) for g in new]
        addresses = (tuple(map(Tensor.data_ptr, own)), of_gradients, groups, [p.numel() for p in parameters])
        plan = self._plan
        if plan is None or plan.addresses != addresses or not are_apart(plan.written, new):
            plan = self._plan = self._new_plan(addresses, step)
        return plan

    def _new_plan(self, addresses: tuple, step: Gathered) -> _Plan:
        """Calls by device, sharding and whether there is momentum; checked before anything is written."""
        parameters, gradients, groups, states, steps = step
        op = type(self).__name__
        by_kind: dict[tuple, list[int]] = {}
        for i, p in enumerate(parameters):
            if p.dtype not in WIDE:
                checks.fail(op, "parameters must be float32 or float64 (half precision rounds updates away)", p.dtype)
            beside = [self._pairs.get(p), *(one[i] for one in states)]
            if any(x is not None and x.dtype != p.dtype for x in beside):  # the model has changed its dtype since
                came = " and ".join(str(x.dtype) for x in beside if x is not None)
                checks.fail(op, f"teacher and averages of a {p.dtype} parameter must have its dtype", came)
            sharding = sharding_of(op, p, gradients[i], self._pairs.get(p))
            has_states = tuple(one[i] is not None for one in states)
            by_kind.setdefault((p.device, sharding, has_states), []).append(i)
        calls = []
        for (_, sharding, has_states), members in by_kind.items():
            members.sort(key=lambda i: parameters[i] not in self._pairs)  # those with a teacher first, as they stood
            chosen = [parameters[i] for i in members]
            calls.append(
                Call(
                    chosen,
                    [local(p) for p in chosen],
                    [
                        [local(x) for i in members if (x := one[i]) is not None] if has else []
                        for one, has in zip(states, has_states, strict=True)
                    ],
                    [steps[i] for i in members] if steps else [],
                    [local(self._pairs[p]) for p in chosen if p in self._pairs],
                    [groups[i] for i in members],
                    sharding,
                )
            )
        written: list[Tensor] = []
        for device in {call.local[0].device for call in calls}:
            targets, sources = [], []
            for call in calls:
                if call.local[0].device == device:
                    for one in (call.local, *call.states, call.teachers):
                        targets += one
                        sources += call.gradients()[: len(one)]
            check_update(op, targets, sources)
            written += targets
        updated = set(parameters)
        rest = [(t, s) for s, t in self._pairs.items() if s not in updated] + self._others
        return _Plan(addresses, spans(written), calls, rest)

    def refresh(self, teacher_momentum: float | Tensor | None = None) -> None:
        """Before a CUDA graph is replayed in which a step was captured: the groups' rates and other numbers of now go
        where the graph reads them. Without it a replay has those of the step before. Nothing waits for the device.

        Args:
            teacher_momentum: as of `step`.
        """
        momentum = self._teacher_momentum if teacher_momentum is None else teacher_momentum
        for device in self._settings:
            self._refreshed(device, momentum)

    def _settings_on(self, device: torch.device, teacher_momentum: float | Tensor) -> Tensor:
        """[G, columns] on a device. Numbers, and tensors on the host, are copied there when they have changed; what is
        a tensor there already never visits the host.
        """
        settings, tensors = self._refreshed(device, teacher_momentum)
        if tensors:
            settings = settings.clone()
            for i, j, value in tensors:
                settings[i, j].copy_(value.reshape(()), non_blocking=True)
        return settings

    def _refreshed(
        self, device: torch.device, teacher_momentum: float | Tensor
    ) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
        """The device's settings, in one memory for all steps, with the numbers of now; and the tensors, by place, that
        are on a device and so aren't in them."""
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
        if kept is not None and kept[0] == rows:
            return kept[1], tensors
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The graph would copy them from the host's memory at every replay, when the host has freed it.
            who = type(self).__name__
            raise RuntimeError(f"{who}: call refresh() with these rates, or take a step, before capturing a CUDA graph")
        host = torch.tensor(rows, dtype=widest_dtype(device))
        if device.type == "cuda":
            host = host.pin_memory()  # torch doesn't reuse it before the copy is done
        if kept is None or kept[1].shape != host.shape:
            settings = host.to(device, non_blocking=True)
        else:
            settings = kept[1].copy_(host, non_blocking=True)
        self._settings[device] = (rows, settings)
        return settings, tensors

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
        self._plan = None
        self._check(self.param_groups[-1])

    # Of each optimiser:

    def _check(self, group: dict[str, Any]) -> None:
        """ValueError for a group that it can't be given."""
        op = type(self).__name__
        for name in ("amsgrad", "maximize", "dampening", "differentiable"):  # of a state that torch or timm have saved
            if group.get(name):
                checks.fail(op, f"there is no {name}", group[name])
        for name in ("lr", "weight_decay", "eps", "trust_coeff"):
            if name in group:
                checks.number(op, name, group[name], low=0, inclusive=True)

    def _row(self, group: dict[str, Any], teacher_momentum: float | Tensor) -> list[Any]:
        """A group's line of the settings."""
        raise NotImplementedError

    def _states_of(self, parameters: list[Tensor], groups: list[int]) -> tuple[list[list[Tensor | None]], list[Tensor]]:
        """Lists of a tensor a parameter, made where there is none yet: of the parameters' shapes, where None is that a
        parameter needs none; and the steps.
        """
        raise NotImplementedError

    def _update(self, call: Call, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        raise NotImplementedError

    def _update_at_once(self, step: Gathered, teachers: list[Tensor | None], settings: Tensor) -> bool:
        """`adamw_of_plain` or `lars_of_plain`; False where the extension isn't built."""
        raise NotImplementedError
