"""LARS, SGD, AdamW with the teacher in the same pass, against formulas in float64, and against torch and timm."""

import copy
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem import optim
from fastjem.kernels.optimizers import columns

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (8, 3, 3, 3), (257, 13), (20_003,)]
DTYPES = [torch.float32, torch.float64]
lars = pytest.mark.parametrize("op", ["lars_"])
adamw = pytest.mark.parametrize("op", ["adamw_"])


def tensors(seed: int, device: str, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]


def double(many: list[Tensor]) -> list[Tensor]:
    return [x.detach().to("cpu", torch.float64, copy=True) for x in many]


def assert_close(got: list[Tensor], expected: list[Tensor], steps: int = 1) -> None:
    for x, e in zip(got, expected, strict=True):
        # Of float32: a few roundings a step, of numbers whose size is about 1.
        error = 1e-13 if x.dtype == torch.float64 else 3e-7
        torch.testing.assert_close(x.double().cpu(), e, rtol=steps * error, atol=steps * error)


def lars_step(p, g, b, s: dict[str, float]) -> tuple[Tensor, Tensor]:
    """One tensor in float64, as the paper and timm have it."""
    wd = s["weight_decay"]
    ratio = 1.0
    if s["adapts"] == 2 or (s["adapts"] == 1 and wd):
        w_norm = math.sqrt((p * p).sum())
        u_norm = math.sqrt(((g + wd * p) ** 2).sum()) if s["decay_in_norm"] else math.sqrt((g * g).sum()) + wd * w_norm
        g_norm = math.sqrt(((g + wd * p) ** 2).sum()) if s["decay_in_norm"] else math.sqrt((g * g).sum())
        if w_norm > 0 and g_norm > 0:
            ratio = s["trust_coeff"] * w_norm / (u_norm + s["eps"])
        if s["trust_clip"]:
            ratio = min(ratio / s["lr"], 1.0)
    d = (g + wd * p) * ratio
    b = s["momentum"] * b + d
    return p - s["lr"] * (d + s["momentum"] * b if s["nesterov"] else b), b


def adamw_step(p, g, m, v, t: int, s: dict[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    p = p - s["lr"] * s["weight_decay"] * p
    m = s["beta1"] * m + (1 - s["beta1"]) * g
    v = s["beta2"] * v + (1 - s["beta2"]) * g * g
    root = (v / (1 - s["beta2"] ** t)).sqrt() + s["eps"]
    return p - s["lr"] * (m / (1 - s["beta1"] ** t)) / root, m, v


GROUPS = {
    "paper": {"adapts": 1},
    "no decay": {"adapts": 1, "weight_decay": 0.0},
    "always": {"adapts": 2, "weight_decay": 0.0, "nesterov": 1},
    "clipped": {"adapts": 1, "trust_clip": 1},
    "with the decay": {"adapts": 1, "decay_in_norm": 1, "weight_decay": 0.3},
    "sgd": {"adapts": 0, "nesterov": 1},
}
LARS = {
    "lr": 0.7, "momentum": 0.9, "weight_decay": 0.02, "teacher_momentum": 0.95, "trust_coeff": 0.05, "eps": 1e-8,
    "nesterov": 0, "adapts": 1, "trust_clip": 0, "decay_in_norm": 0,
}  # fmt: skip
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "teacher_momentum": 0.3}


def settings(names: tuple[str, ...], device: str, *groups: dict[str, float]) -> Tensor:
    return torch.tensor([[group[name] for name in names] for group in groups], dtype=torch.float64, device=device)


@lars
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPS)
def test_update_of_lars(op, name, dtype, momentum, implementation):
    """Three steps: every shape, half of the parameters with a teacher, a second group; the second step with a scale."""
    device = implementation.device
    of = [{**LARS, **GROUPS[name], "momentum": momentum or 0.0}, {**LARS, "lr": 0.1, "momentum": momentum or 0.0}]
    groups = [i % 2 for i in range(len(SHAPES))]
    p, b = tensors(0, device, dtype), [torch.zeros_like(x) for x in tensors(0, device, dtype)]
    teachers = tensors(1, device, dtype)[:5]
    expected_p, expected_b, expected_t = double(p), double(b), double(teachers)
    for step in range(3):
        g = tensors(2 + step, device, dtype)
        scale = 8.0 if step == 1 else 1.0
        torch.ops.fastjem.lars_(
            p, [x * scale for x in g], b if momentum else [], teachers, settings(columns.LARS, device, *of), groups,
            None,
            torch.tensor(scale, device=device) if step == 1 else None,
            torch.zeros((), device=device) if step == 1 else None,
        )  # fmt: skip
        for i, x in enumerate(double(g)):
            expected_p[i], expected_b[i] = lars_step(expected_p[i], x, expected_b[i], of[groups[i]])
        expected_t = [0.95 * t + 0.05 * s for t, s in zip(expected_t, expected_p, strict=False)]
    assert_close(p, expected_p, 4)
    assert_close(teachers, expected_t, 4)
    if momentum:
        assert_close(b, expected_b, 4)


@adamw
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_momentum", [0.3, 0.95])
def test_update_of_adamw(op, dtype, teacher_momentum, implementation):
    device = implementation.device
    of = [
        {**ADAMW, "teacher_momentum": teacher_momentum},
        {**ADAMW, "weight_decay": 0.0, "teacher_momentum": teacher_momentum},
    ]
    groups = [i % 2 for i in range(len(SHAPES))]
    p = tensors(0, device, dtype)
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    steps = [torch.zeros((), device=device) for _ in p]
    teachers = tensors(1, device, dtype)[:6]
    ep, em, ev, et = double(p), double(m), double(v), double(teachers)
    for step in range(3):
        g = tensors(2 + step, device, dtype)
        scale = 8.0 if step == 1 else 1.0
        torch.ops.fastjem.adamw_(
            p, [x * scale for x in g], m, v, steps, teachers, settings(columns.ADAMW, device, *of), groups,
            torch.tensor(scale, device=device) if step == 1 else None,
            torch.zeros((), device=device) if step == 1 else None,
        )  # fmt: skip
        for i, x in enumerate(double(g)):
            ep[i], em[i], ev[i] = adamw_step(ep[i], x, em[i], ev[i], step + 1, of[groups[i]])
        et = [teacher_momentum * t + (1 - teacher_momentum) * s for t, s in zip(et, ep, strict=False)]
    assert_close(p, ep, 4)
    assert_close(m, em, 4)
    assert_close(v, ev, 4)
    assert_close(teachers, et, 4)
    assert all(x.item() == 3 for x in steps)


@pytest.mark.parametrize("op", ["lars_", "adamw_"])
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_widened(op, gradient_dtype, implementation):
    """The same bits as with the gradients in float32."""
    device = implementation.device
    results = []
    for wide in (False, True):
        p, s1, s2 = tensors(0, device), tensors(1, device), [x.abs() for x in tensors(2, device)]
        g = tensors(3, device, gradient_dtype)
        g = [x.float() for x in g] if wide else g
        call(op, p, g, s1, s2, [], device)
        results.append([*p, *s1])
    assert all(map(torch.equal, *results))


def call(op, p, g, first, second, teachers, device, scale=None, found=None, steps=None) -> None:
    """One step of either operator, with one group."""
    groups = [0] * len(p)
    if op == "lars_":
        of = settings(columns.LARS, device, LARS)
        torch.ops.fastjem.lars_(p, g, first, teachers, of, groups, None, scale, found)
    else:
        steps = steps or [torch.ones((), device=device) for _ in p]
        of = settings(columns.ADAMW, device, ADAMW)
        torch.ops.fastjem.adamw_(p, g, first, second, steps, teachers, of, groups, scale, found)


@pytest.mark.parametrize("op", ["lars_", "adamw_"])
def test_update_is_left_out_where_gradients_are_not_finite(op, implementation):
    """Parameters and averages keep their bits; the teacher follows them as it does behind a skipped step."""
    device = implementation.device
    p, s1, s2, t = tensors(0, device), tensors(1, device), [x.abs() for x in tensors(2, device)], tensors(3, device)
    g = [torch.full_like(x, torch.nan) for x in p]
    before = [x.clone() for x in (*p, *s1, *s2)]
    steps = [torch.ones((), device=device) for _ in p]
    call(op, p, g, s1, s2, t, device, found=torch.ones((), device=device), steps=steps)
    assert all(map(torch.equal, before, (*p, *s1, *s2))) and all(x == 1 for x in steps)
    w = (LARS if op == "lars_" else ADAMW)["teacher_momentum"]
    assert_close(t, [w * a + (1 - w) * b for a, b in zip(double(tensors(3, device)), double(p), strict=True)])


@pytest.mark.parametrize("op", ["lars_", "adamw_"])
def test_layouts_of_update(op, implementation):
    """Channels-last, transposed, mixed layouts, parts of larger tensors, odd addresses; what lies around stays."""
    device = implementation.device
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).float().to(device)

    def many() -> list[Tensor]:
        return [
            tensor(8, 4, 3, 3).to(memory_format=torch.channels_last), tensor(8, 4, 3, 3), tensor(6, 5).T,
            tensor(4, 101)[1:3, 1:100], tensor(1001)[1:], tensor(8, 4, 3, 3).to(memory_format=torch.channels_last),
        ]  # fmt: skip

    def plain(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    lists = [many() for _ in range(5)]
    lists[1][5] = tensor(8, 4, 3, 3)  # a gradient that is laid out otherwise
    lists[2][1] = lists[2][1].to(memory_format=torch.channels_last)  # an average
    lists[3] = [x.abs_() for x in lists[3]]
    contiguous = [[plain(x) for x in one] for one in lists]
    around = lists[0][3]._base.clone()
    call(op, *lists[:4], lists[4], device)
    call(op, *contiguous[:4], contiguous[4], device)
    for one, other in zip(lists, contiguous, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=3e-7, atol=1e-7)
    around[1:3, 1:100] = lists[0][3]
    assert torch.equal(around, lists[0][3]._base)


@lars
def test_norms_are_right_for_tiny_and_large_numbers(op, implementation):
    """Squares of 1e-25 are 0 in float32; where the sums are float64 they aren't, as on the CPU. And many parts."""
    device = implementation.device
    shapes = [(70_001,), (5,)]
    p, g = tensors(0, device, shapes=shapes), tensors(1, device, shapes=shapes)
    of = settings(columns.LARS, device, LARS)
    norms = torch.ops.fastjem.lars_norms(p, g, of, [0, 0], None)
    expected = torch.stack(
        [torch.stack([x.square().sum() for x in pair]) for pair in zip(double(p), double(g), strict=True)]
    )
    torch.testing.assert_close(norms.cpu(), expected, rtol=1e-6, atol=0)
    if implementation.name != "triton":
        small = [x * 1e-25 for x in g]
        norms = torch.ops.fastjem.lars_norms(p, small, of, [0, 0], None)
        torch.testing.assert_close(norms[:, 1].cpu(), expected[:, 1] * 1e-50, rtol=1e-6, atol=0)


@lars
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_has_the_same_bits_for_any_number_of_threads(op, dtype, implementation):
    """In float64 it is seen whether the squares were added in other parts: those of large tensors, by all threads."""
    if implementation.name == "reference" and dtype == torch.float64:
        pytest.skip("torch's sums have other bits with other threads")
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        shapes = [(150_001,), (7,), (150_003,), (40_000,)]
        p, g, b = (tensors(i, implementation.device, dtype, shapes=shapes) for i in range(3))
        call("lars_", p, g, b, [], [], implementation.device)
        torch.set_num_threads(before)
        results.append(torch.cat(p).cpu())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("op", ["lars_", "adamw_"])
def test_update_follows_gradients_that_move(op, implementation, monkeypatch):
    """New gradients at each step, of either alignment, then the first ones again: the same numbers as of one step each
    with tensors of their own. On a GPU the table is made once for each alignment, and addresses copied for new ones.
    """
    device = implementation.device
    made: list[str] = []
    if implementation.name == "triton":
        from fastjem.kernels.optimizers import tables

        make, to_device = tables._tables, tables._to_device
        monkeypatch.setattr(tables, "_tables", lambda *given: made.append("table") or make(*given))
        monkeypatch.setattr(tables, "_to_device", lambda *given: made.append("copy") or to_device(*given))
    mine, yours = ([tensors(0, device), tensors(1, device), [x.abs() for x in tensors(2, device)]] for _ in range(2))
    steps = [[torch.ones((), device=device) for _ in SHAPES] for _ in range(2)]
    gradients = [tensors(3 + i, device) for i in range(2)]
    gradients.append([torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in tensors(5, device)])
    copies = []
    for g in [*gradients, gradients[0]]:
        before = len(made)
        call(op, mine[0], g, *mine[1:], [], device, steps=steps[0])
        copies.append(made[before:])
        moved = [[x.clone() for x in one] for one in yours]
        call(op, moved[0], [x.clone() for x in g], *moved[1:], [], device, steps=steps[1])
        for one, other in zip(yours, moved, strict=True):
            for x, y in zip(one, other, strict=True):
                x.copy_(y)
    assert all(map(torch.equal, mine[0], yours[0]))
    if implementation.name == "triton":
        assert "table" in copies[0] and copies[1] == ["copy"] and copies[3] == [], copies
        assert "table" in copies[2], copies  # odd addresses: other kernels


# The optimisers ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Callable, Callable]] = {
    "adamw": (lambda g: optim.AdamW(g, lr=0.01), lambda g: torch.optim.AdamW(g, lr=0.01)),
    "sgd": (lambda g: optim.SGD(g, lr=0.01), lambda g: torch.optim.SGD(g, lr=0.01)),
    "nesterov": (
        lambda g: optim.SGD(g, lr=0.01, momentum=0.9, nesterov=True),
        lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9, nesterov=True),
    ),
    "lars": (lambda g: optim.LARS(g, lr=0.5), lambda g: timm_lars(g, lr=0.5, momentum=0.9)),
    "larc": (
        lambda g: optim.LARS(g, lr=0.5, trust_clip=True, trust_coeff=0.02, nesterov=True),
        lambda g: timm_lars(g, lr=0.5, momentum=0.9, trust_clip=True, trust_coeff=0.02, nesterov=True),
    ),
}
named = pytest.mark.parametrize("name", OPTIMIZERS)


def timm_lars(groups, **options) -> torch.optim.Optimizer:
    return pytest.importorskip("timm.optim").Lars(groups, **options)


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 7), nn.Linear(7, 4)
    return nn.Sequential(*layers).to(device, memory_format=torch.channels_last)


def groups_of(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def differentiate(model: nn.Module, step: int) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).device)
    model.zero_grad()
    model(x).square().mean().backward()


@named
def test_twenty_steps_are_torchs_and_states_are_exchanged(name):
    ours, theirs = OPTIMIZERS[name]
    a, b = network(), network()
    teacher_a, teacher_b = copy.deepcopy(a), copy.deepcopy(b)
    x, y = ours(groups_of(a)), theirs(groups_of(b))
    for step in range(20):
        if step == 10:  # each goes on with the other's state
            saved = copy.deepcopy((x.state_dict(), y.state_dict()))
            x, y = ours(groups_of(a)), theirs(groups_of(b))
            x.load_state_dict(saved[1])
            y.load_state_dict(saved[0])
        if step % 10 == 0:
            x.attach_teacher(teacher_a.parameters(), a.parameters())
        for model, optimizer, options in ((a, x, {"teacher_momentum": 0.9}), (b, y, {})):
            differentiate(model, step)
            optimizer.step(**options)
        F.ema_update_(teacher_b.parameters(), b.parameters(), 0.9)
    for p, q in zip(
        (*a.parameters(), *teacher_a.parameters()), (*b.parameters(), *teacher_b.parameters()), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=5e-7)


@named
def test_the_teacher_has_the_bits_of_ema_update(name):
    """Beside it: a frozen student, one without a gradient, one in another dtype, one that the optimiser hasn't."""
    results = []
    for fused in (True, False):
        model = network()
        model[3].bias.requires_grad_(False)
        other = nn.Parameter(torch.ones(3))
        students = [*model.parameters(), other]
        teachers = [torch.full_like(p, 0.5, dtype=torch.float64 if i == 0 else None) for i, p in enumerate(students)]
        optimizer = OPTIMIZERS[name][0](groups_of(model))
        momentum = torch.tensor(0.99, dtype=torch.float64)
        if fused:
            optimizer.attach_teacher(teachers, students, momentum)
        for step in range(3):
            differentiate(model, step)
            model[4].bias.grad = None
            momentum.fill_(0.9 + 0.03 * step)
            optimizer.step()
            if not fused:
                F.ema_update_(teachers, students, momentum)
        results.append([*teachers, *students])
    assert all(map(torch.equal, *results))


@named
def test_numbers_may_be_tensors_and_schedulers_move_them(name):
    results = []
    for as_tensor in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name][0](groups_of(model))
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.02) if as_tensor else 0.02
            if as_tensor:
                group["weight_decay"] = torch.tensor(group["weight_decay"], dtype=torch.float64)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            differentiate(model, step)
            optimizer.step()
            scheduler.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@named
def test_grad_scaler_skips_what_is_not_finite(name):
    """torch's scaler hands its scale and what it found to the optimiser; the same steps as without it."""
    results = []
    for scaled in (True, False):
        model = network()
        optimizer = OPTIMIZERS[name][0](groups_of(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(3):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            scaler.scale(model(x).square().mean() * (torch.inf if step == 1 and scaled else 1)).backward()
            if step != 1 or scaled:
                scaler.step(optimizer)
                scaler.update()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_closure_is_called_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = optim.SGD([p], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4 and p.item() == 0


def test_autograd_notices_the_step():
    p = nn.Parameter(torch.ones(3))
    q = torch.ones(3, requires_grad=True)
    loss = (p * q).sum()
    p.grad = torch.ones(3)
    optim.LARS([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_written_where_something_is_wrong():
    memory = torch.zeros(8)
    a, b = nn.Parameter(memory[:4]), nn.Parameter(memory[2:6])
    optimizer = optim.AdamW([a, b])
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match="AdamW: each tensor that is written must have memory of its own"):
        optimizer.step()
    assert not memory.any()
    p = nn.Parameter(torch.zeros(4))
    for make in (optim.LARS, optim.SGD, optim.AdamW):
        optimizer = make([p])
        p.grad = torch.ones(4)
        optimizer.attach_teacher([p.detach()], [p])
        with pytest.raises(ValueError, match="memory of its own"):
            optimizer.step()
        optimizer.attach_teacher([], [])
        p.grad = torch.ones(4).to_sparse()
        with pytest.raises(ValueError, match="gradients must be dense"):
            optimizer.step()
    assert not p.any()


def test_gradients_are_freed_between_steps():
    """Nothing of the optimiser holds what `zero_grad` lets go: a step needs the memory of one set of gradients."""
    for make in (optim.LARS, optim.SGD, optim.AdamW):
        model = network()
        optimizer = make(model.parameters())
        differentiate(model, 0)
        optimizer.step()
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.zero_grad()
        assert not any(gradient() is not None for gradient in gradients)


def as_number(step: Tensor) -> float:
    return step.item()


@pytest.mark.parametrize("kind", [Tensor.double, as_number, Tensor.clone])
def test_steps_of_a_state_may_be_of_any_kind(kind):
    """torch's are float64 where that is the default dtype, and have been numbers; a kernel reads float32."""
    a, b = network(), network()
    x, y = torch.optim.AdamW(a.parameters(), lr=0.01), optim.AdamW(b.parameters())
    differentiate(a, 0)
    x.step()
    b.load_state_dict(a.state_dict())
    state = copy.deepcopy(x.state_dict())
    for of_one in state["state"].values():
        of_one["step"] = kind(of_one["step"])
    y.load_state_dict(state)
    for model, optimizer in ((a, x), (b, y)):
        differentiate(model, 1)
        optimizer.step()
    assert all(one["step"].dtype == torch.float32 and one["step"].item() == 2 for one in y.state.values())
    assert y.param_groups[0]["fused"]  # torch then puts a loaded step where the parameter is
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=5e-7)


def test_states_and_teachers_of_another_dtype_are_refused():
    """A model that became float64 behind its first step: kernels trust the parameter's dtype."""
    for make in (optim.LARS, optim.AdamW, optim.SGD):
        model = network()
        optimizer = make(model.parameters())
        if make is optim.SGD:  # it has no states
            optimizer.attach_teacher(copy.deepcopy(model).parameters(), model.parameters())
        differentiate(model, 0)
        optimizer.step()
        model.double()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"of a torch.float64 parameter must have its dtype, got torch.float32"):
            optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))


MISTAKES = [
    (lambda p: optim.LARS([p], lr=-1.0), "LARS: lr must be at least 0 and finite, got -1"),
    (lambda p: optim.LARS([p], weight_decay=math.nan), "LARS: weight_decay must be at least 0 and finite, got nan"),
    (lambda p: optim.SGD([p], nesterov=True), "SGD: nesterov needs a momentum, got 0"),
    (lambda p: optim.AdamW([p], betas=(0.9, 1.0)), r"AdamW: betas\[1\] must be less than 1, got 1"),
    (lambda p: optim.AdamW([{"params": [p], "amsgrad": True}]), "AdamW: there is no amsgrad, got True"),
    (lambda p: optim.SGD([p]).attach_teacher([p], []), "SGD: teacher and student must be as many tensors, got 1 and 0"),
    (lambda p: optim.LARS([p], trust_coeff=-1), "LARS: trust_coeff must be at least 0 and finite, got -1"),
    (lambda p: optim.SGD([p]).attach_teacher([p.half()], [p]), "SGD: a teacher must be float32 or float64 .*, got"),
    (lambda p: optim.SGD([p]).attach_teacher([1.0], [p]), "SGD: teacher and student must be tensors, got float and"),
    (lambda p: optim.SGD([p]).attach_teacher([p.double()], [p], -1), r"SGD: teacher momentum must be in .*, got -1"),
    (lambda p: optim.SGD([p]).attach_teacher([p], [p], 1.5), r"SGD: teacher momentum must be in \[0, 1\], got 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.zeros(3)))


def test_a_copy_of_an_optimizer_goes_on():
    """Pickled and deepcopied optimisers have no teacher, and all else."""
    model = network()
    optimizer = optim.AdamW(groups_of(model))
    optimizer.attach_teacher(copy.deepcopy(model).parameters(), model.parameters())
    differentiate(model, 0)
    optimizer.step()
    other, of_other = copy.deepcopy((model, optimizer))
    for one, its in ((model, optimizer), (other, of_other)):
        differentiate(one, 1)
        its.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_new_gradients_need_no_new_plan(monkeypatch):
    """`zero_grad` makes new ones at each step, of which only their memory is looked at."""
    plans = []
    make = optim.AdamW._new_plan
    monkeypatch.setattr(optim.AdamW, "_new_plan", lambda self, *given: plans.append(1) or make(self, *given))
    p = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = optim.AdamW([p])
    held = []
    for _ in range(4):
        p.grad = torch.randn(4, 3)
        held.append(p.grad)  # so that none gets the memory of the one before
        optimizer.step()
    assert len(plans) == 1
    before = p.detach().clone()
    p.grad = optimizer.state[p]["exp_avg"].view(4, 3)[:]
    with pytest.raises(ValueError, match="AdamW: no tensor that is written may be another's source"):
        optimizer.step()
    p.grad = torch.randn(4, 3)
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="AdamW: a tensor's storage must hold its elements"):
        optimizer.step()
    assert torch.equal(p, before)


def test_larc_is_sgd_whose_rate_the_trust_ratio_may_only_make_smaller() -> None:
    """As the recipes for CIFAR have it: 0.02 |p| / |g|, and never more than the rate."""
    for gradient, expected in ((1.0, 0.02), (0.01, 0.4)):  # of |p| = |g| the ratio is 0.02; of a small gradient 2
        p = nn.Parameter(torch.eye(4))
        p.grad = gradient * torch.eye(4)
        optimizer = optim.build("larc", optim.parameter_groups(nn.ParameterList([p])))
        optim.Schedule(steps=10, learning_rate=0.4, weight_decay=1e-9).apply(optimizer, 0)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.eye(4) * (1 - expected * gradient), rtol=1e-5, atol=1e-6)
    assert optim.scaled("larc", 0.4, 64) == pytest.approx(0.1)
