"""ema_update_ against a loop in float64, for every implementation."""

import contextlib
import math
import time

import pytest
import torch

from fastjem.functional import ema_update_
from fastjem.ops import direct

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (64, 3, 7, 7), (1000,), (257, 129), (70_001,)]
op = pytest.mark.parametrize("op", ["ema_update_"])


def tensors(dtype: torch.dtype, device: str, seed: int, shapes=SHAPES) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]


@op
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_update(op, momentum, student_dtype, implementation):
    teacher = tensors(torch.float32, implementation.device, 0)
    student = tensors(student_dtype, implementation.device, 1)
    expected = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(teacher, student, strict=True)]
    before = [t.clone() for t in teacher]
    ema_update_(teacher, student, momentum)
    for t, b, s, e in zip(teacher, before, student, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=3e-7, atol=3e-7)
        if momentum == 0:
            assert torch.equal(t, s.float())
        if momentum == 1:
            assert torch.equal(t, b)


@op
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps_stay_by_the_float64_loop(op, student_dtype, implementation):
    shapes = [(33,), (20, 10)]
    steps = 50 if implementation.name == "triton" and implementation.device == "cpu" else 1000
    teacher = tensors(torch.float32, implementation.device, 0, shapes)
    oracle = [t.double() for t in teacher]
    momentum = torch.tensor(0.996, dtype=torch.float64, device=implementation.device)
    for step in range(steps):
        student = tensors(student_dtype, implementation.device, step + 1, shapes)
        ema_update_(teacher, student, momentum)
        oracle = [0.996 * t + 0.004 * s.double() for t, s in zip(oracle, student, strict=True)]
    for t, o in zip(teacher, oracle, strict=True):
        assert (t.double() - o).abs().max() < 1e-6


@op
def test_float64_teacher(op, implementation):
    teacher, student = (tensors(torch.float64, implementation.device, seed) for seed in (0, 1))
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher, student, strict=True)]
    ema_update_(teacher, student, 0.9)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-12, atol=1e-12)


@op
def test_layouts(op, implementation):
    """Both channels-last (one block of memory each), mixed layouts, views of larger tensors, odd addresses."""
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(implementation.device)

    channels_last = {"memory_format": torch.channels_last}
    memory = tensor(4, 101)
    around = memory.clone()
    teacher = [
        tensor(8, 4, 3, 3).to(**channels_last),
        tensor(8, 4, 3, 3),
        tensor(8, 4, 3, 3).to(**channels_last),
        tensor(6, 5).T,
        memory[1:3, 1:100],
        tensor(1001)[1:],
        tensor(8, 1, 1, 1).to(**channels_last),
    ]
    student = [
        tensor(8, 4, 3, 3).to(**channels_last),
        tensor(8, 4, 3, 3).to(**channels_last),
        tensor(8, 4, 3, 3),
        tensor(5, 6),
        tensor(2, 99),
        tensor(1003)[3:],
        tensor(8, 1, 1, 1),
    ]
    expected = [0.75 * t + 0.25 * s for t, s in zip(teacher, student, strict=True)]
    ema_update_(teacher, student, 0.75)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-6, atol=1e-6)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    untouched[1:3, 1:100] = False
    assert torch.equal(memory[untouched], around[untouched])


@op
def test_parameters_are_replaced_between_calls(op, implementation):
    """Addresses are looked up at every call: new storage, a changed dtype, a shorter list."""
    for seed, shapes in enumerate([SHAPES, SHAPES, [(5,), (6,)], [(6,), (5,)]]):
        for dtype in (torch.float32, torch.bfloat16):
            teacher = tensors(torch.float32, implementation.device, seed, shapes)
            student = tensors(dtype, implementation.device, seed + 10, shapes)
            expected = [0.9 * t + 0.1 * s.float() for t, s in zip(teacher, student, strict=True)]
            ema_update_(teacher, student, 0.9)
            for t, e in zip(teacher, expected, strict=True):
                torch.testing.assert_close(t, e, rtol=1e-6, atol=1e-6)


@op
def test_modules_under_inference_and_same_bits(op, implementation):
    teacher, student = (torch.nn.Linear(37, 11).to(implementation.device) for _ in range(2))
    copies = [p.detach().clone() for p in teacher.parameters()]
    ema_update_(teacher.parameters(), student.parameters(), 0.99)
    ema_update_(copies, list(student.parameters()), 0.99)
    assert all(map(torch.equal, copies, teacher.parameters()))
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


@op
def test_compiles_in_one_graph(op, implementation):
    def step(teacher, student, momentum):
        ema_update_(teacher, student, momentum)
        return [t * 2 for t in teacher]

    shapes = [(5,), (3, 4)]
    teacher, student = (tensors(torch.float32, implementation.device, seed, shapes) for seed in (0, 1))
    momentum = torch.tensor(0.9, dtype=torch.float64, device=implementation.device)
    expected = [2 * (0.9 * t + 0.1 * s) for t, s in zip(teacher, student, strict=True)]
    torch._dynamo.reset()
    doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(teacher, student, momentum)
    for t, d, e in zip(teacher, doubled, expected, strict=True):
        torch.testing.assert_close(d, e, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(2 * t, e, rtol=1e-6, atol=1e-6)


@op
def test_autograd_notices(op, implementation):
    """As of `lerp_`: backward of what was computed with the old values raises, and doesn't return a wrong gradient."""
    w = torch.ones(3, device=implementation.device, requires_grad=True)
    x = torch.ones(3, device=implementation.device, requires_grad=True)
    y = (w * x).sum()
    ema_update_([w], [torch.zeros_like(w)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@op
def test_memory_is_checked_before_any_is_written(op, implementation):
    """What would be written twice, or is another's source, is refused; what interleaves or is its own pair isn't."""
    memory = torch.zeros(12, device=implementation.device)
    square = torch.zeros(9, device=implementation.device)
    first = torch.zeros(2, device=implementation.device)
    freed = torch.zeros(4, device=implementation.device)
    freed.untyped_storage().resize_(0)

    def of(*targets: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [first, *targets], [torch.ones_like(first), *(torch.ones(x.shape, device=x.device) for x in targets)]

    refused = {
        "the same tensor": of(memory, memory),
        "ends that overlap": of(memory[:7], memory[5:]),
        "a part of another": of(memory, square, memory[3:5]),
        "every second and the first": of(memory[::2], memory[:3]),
        "other dtype": of(memory[:4].view(torch.float64), memory[3:]),
        "expanded": of(memory[:1].expand(5)),
        "a window that slides": of(square.as_strided((3, 3), (2, 1))),
        "another's source": ([first, memory[:6], memory[6:]], [torch.ones_like(first), memory[6:], memory[:6]]),
        "a part of its own source": ([first, memory[:7]], [torch.ones_like(first), memory[5:]]),
        "freed": of(freed),
        "a shape": ([first, square], [torch.ones_like(first), torch.ones(3, device=implementation.device)]),
        "a dtype": ([first, memory.half()], [torch.ones_like(first), memory]),
    }
    for name, (teacher, student) in refused.items():
        with pytest.raises(ValueError, match="ema_update_: "):
            ema_update_(teacher, student, 0.9)
        assert not first.any() and not memory.any() and not square.any(), name
    for wrong in (1.5, -0.1, float("nan"), True):
        with pytest.raises(ValueError, match="ema_update_: momentum must be "):
            ema_update_(*of(memory), wrong)
    if implementation.device == "cpu":  # on a GPU nobody looks
        with pytest.raises(ValueError, match=r"ema_update_: momentum must be in \[0, 1\], got 1.5"):
            ema_update_(*of(memory), torch.tensor(1.5))
    with torch.inference_mode():
        inference = torch.zeros(3, device=implementation.device)
        ema_update_([inference], [torch.ones_like(inference)], 0.5)
    with pytest.raises(ValueError, match="inference"):
        ema_update_([inference], [torch.ones_like(inference)], 0.5)
    assert not memory.any() and (inference == 0.5).all()

    columns = torch.zeros(200, 400, device=implementation.device).unbind(1)
    began = time.monotonic()
    ema_update_(columns[:200], columns[200:], 0.5)  # a look at each of the 59,800 pairs would take 20 s
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="memory of target 199 as source 0"):
        ema_update_(columns[:200], columns[199:399], 0.5)
    ema_update_(*of(memory[::2], memory[1::2]), 0.5)  # they interleave
    assert (memory == 0.5).all()
    ema_update_([memory], [memory], 0.5)  # a frozen part that both models share
    assert (memory == 0.5).all()


def _freed(teacher, student):
    student[1].untyped_storage().resize_(0)


def _shrunk(teacher, student):
    teacher[1].untyped_storage().resize_(8)


def _replaced_by_another_ones_memory(teacher, student):
    teacher[1].data = teacher[0].data


def _replaced_by_another_ones_source(teacher, student):
    student[1].data = teacher[0].data


def _of_another_dtype(teacher, student):
    student[1].data = student[1].data.view(torch.int32)


def _of_another_shape(teacher, student):
    student[1].data = student[1].data.view(2, 8)


def _expanded(teacher, student):
    teacher[1].data = teacher[1].data[:1].expand(16)


def _a_view_of_its_own_memory(teacher, student):
    teacher[1].data = teacher[0].data[:8].expand(2, 8)
    student[1].data = student[1].data.view(2, 8)


@pytest.mark.parametrize(
    "change",
    [
        _freed,
        _shrunk,
        _replaced_by_another_ones_memory,
        _replaced_by_another_ones_source,
        _of_another_dtype,
        _of_another_shape,
        _expanded,
        _a_view_of_its_own_memory,
    ],
)
def test_what_was_found_right_is_looked_at_again(change):
    """Training updates the same tensors at each step, and what was found of them is remembered."""
    teacher = [torch.zeros(16) for _ in range(3)]
    student = [torch.ones(16) for _ in range(3)]
    for _ in range(2):
        ema_update_(teacher, student, 0.5)
    change(teacher, student)
    with pytest.raises(ValueError, match="ema_update_: "):
        ema_update_(teacher, student, 0.5)
    assert torch.equal(teacher[2], torch.full((16,), 0.75))


def test_the_way_past_the_dispatcher_writes_the_same_bits():
    shapes = [(), (3,), (0,), (5, 4), (2, 3, 5, 7), (300, 257)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float32, torch.float32]
    students = [torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float32, torch.float64]
    results = []
    for context in (contextlib.nullcontext(), direct.off()):
        teacher = [torch.linspace(-1, 1, math.prod(s)).reshape(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
        student = [torch.linspace(2, 3, math.prod(s)).reshape(s).to(d) for s, d in zip(shapes, students, strict=True)]
        for side in (teacher, student):
            side[4] = side[4].contiguous(memory_format=torch.channels_last)
        versions = [t._version for t in teacher]
        with context:
            ema_update_(teacher, student, 0.9)
            ema_update_(teacher, student, torch.tensor(0.25))
        assert all(t._version == before + 2 for t, before in zip(teacher, versions, strict=True))
        results.append(teacher)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
