"""Steps of optimisers by one call of C++, which looks at all tensors itself: the same bits as by the operators, and
nothing is written where something doesn't fit.
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
from conftest import _C
from test_optimizers import (
    ADAMW,
    LARS,
    OPTIMIZERS,
    adamw_step,
    assert_close,
    differentiate,
    groups_of,
    lars_step,
    named,
    network,
    settings,
    tensors,
)  # fmt: skip

from fastjem.kernels import plain
from fastjem.kernels.optimizers import columns
from fastjem.ops import direct

if not _C or plain.facts([], []) is None:
    pytest.skip("needs the C++ extension, and torch 2.10", allow_module_level=True)

from fastjem.kernels.optimizers import cpu

Lists = list[list[Any]]


def call_of_plain(name: str, lists: Lists, groups: list[int]) -> bool:
    """`adamw_of_plain` or `lars_of_plain` of parameters, gradients, averages (squares, steps), teachers."""
    names, of = (columns.ADAMW, ADAMW) if name == "adamw" else (columns.LARS, LARS)
    given = settings(names, "cpu", of, {**of, "lr": of["lr"] / 2})
    return getattr(cpu, f"{name}_of_plain")(*lists, groups, given)


def lists_of(name: str) -> Lists:
    p, g, first, second, teachers = (list[Any](tensors(seed, "cpu")) for seed in range(5))
    teachers[3] = None
    steps = [torch.ones(()) for _ in p]
    return [p, g, first, [x.abs() for x in second], steps, teachers] if name == "adamw" else [p, g, first, teachers]


kinds = pytest.mark.parametrize("name", ["adamw", "lars"])


@named
def test_one_call_takes_the_step_that_the_operator_takes(name, monkeypatch):
    """The same bits as by the dispatcher, for 4 steps with new gradients; all but the first are one call."""
    calls = []
    for op in ("adamw_of_plain", "lars_of_plain"):
        at_once = getattr(cpu, op)
        monkeypatch.setattr(cpu, op, lambda *given, at_once=at_once: calls.append(at_once(*given)) or calls[-1])
    results = []
    for is_off in (False, True):
        model = network()
        teacher = copy.deepcopy(model)
        optimizer = OPTIMIZERS[name][0](groups_of(model))
        optimizer.attach_teacher(teacher.parameters(), model.parameters(), 0.9)
        with direct.off() if is_off else contextlib.nullcontext():
            for step in range(4):
                differentiate(model, step)
                optimizer.step(teacher_momentum=0.9 + 0.01 * step)
        results.append([*model.parameters(), *teacher.parameters()])
    assert calls == [True] * 3
    assert all(map(torch.equal, *results))


@kinds
def test_value_of_one_call(name):
    """Two groups, a parameter without a teacher and one without elements, in float64."""
    lists = lists_of(name)
    p, g, *states, teachers = ([None if x is None else x.double() for x in one] for one in lists)
    groups = [i % 2 for i in range(len(p))]
    assert call_of_plain(name, lists, groups)
    for i, x in enumerate(p):
        of = {**(ADAMW if name == "adamw" else LARS)}
        of["lr"] = of["lr"] / (1 + groups[i])
        if name == "adamw":
            updated, *rest = adamw_step(x, g[i], states[0][i], states[1][i], 2, of)
        else:
            updated, *rest = lars_step(x, g[i], states[0][i], of)
        assert_close([lists[0][i], *(one[i] for one in lists[2 : 2 + len(rest)])], [updated, *rest], 4)
        if teachers[i] is not None:
            w = of["teacher_momentum"]
            assert_close([lists[-1][i]], [w * teachers[i] + (1 - w) * updated], 4)
    if name == "adamw":
        assert all(step == 2 for step in lists[4])


def _shared(lists: Lists, a: int, b: int) -> None:
    """Tensor 7 of list b begins within tensor 6 of list a."""
    memory = torch.zeros(23_344)
    lists[a][6] = memory[:3341].view(257, 13)
    lists[b][7] = memory[3340:-1]


UNFIT = {
    "parameters share memory": lambda lists: _shared(lists, 0, 0),
    "an average is another's gradient": lambda lists: _shared(lists, 2, 1),
    "a gradient is another's parameter": lambda lists: _shared(lists, 1, 0),
    "a teacher is its own parameter": lambda lists: lists[-1].__setitem__(2, lists[0][2]),
    "a teacher in another dtype": lambda lists: lists[-1].__setitem__(2, torch.zeros(7).double()),
    "an average in another shape": lambda lists: lists[2].__setitem__(2, torch.zeros(6)),
    "a gradient in another shape": lambda lists: lists[1].__setitem__(3, torch.zeros(5, 3)),
    "a gradient in another layout": lambda lists: lists[1].__setitem__(3, torch.zeros(5, 3).T),
    "a gradient of integers": lambda lists: lists[1].__setitem__(2, torch.ones(7, dtype=torch.int64)),
    "a sparse gradient": lambda lists: lists[1].__setitem__(2, torch.ones(7).to_sparse()),
    "no gradient": lambda lists: lists[1].__setitem__(2, None),
    "a gradient too few": lambda lists: lists[1].pop(),
    "a gradient too many": lambda lists: lists[1].append(torch.ones(1)),
    "a freed gradient": lambda lists: lists[1][2].untyped_storage().resize_(0),
    "a parameter with gaps": lambda lists: [one.__setitem__(3, torch.zeros(3, 9)[:, :5]) for one in lists[:3]],
    "a parameter in half precision": lambda lists: lists[0].__setitem__(2, torch.zeros(7).half()),
}
UNFIT_ADAMW = {
    "no square": lambda lists: lists[3].__setitem__(2, None),
    "a step too few": lambda lists: lists[4].pop(),
    "a step in float64": lambda lists: lists[4].__setitem__(0, torch.zeros((), dtype=torch.float64)),
    "steps share memory": lambda lists: lists[4].__setitem__(0, lists[4][1]),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [("adamw", change) for change in (*UNFIT, *UNFIT_ADAMW)] + [("lars", change) for change in UNFIT],
)
def test_one_call_writes_nothing_where_something_does_not_fit(name, change):
    lists = lists_of(name)
    {**UNFIT, **UNFIT_ADAMW}[change](lists)
    written = [x for i in (0, 2, -1) for x in lists[i] if x is not None]
    before = [x.clone() for x in written]
    assert not call_of_plain(name, lists, [0] * len(lists[0]))
    assert all(map(torch.equal, before, written))


@named
def test_a_step_of_nothing_but_empty_tensors(name):
    """A second one, too, which is compared with the first; by operators, as a teacher follows somebody else."""
    empty, other = (torch.nn.Parameter(torch.zeros(count)) for count in (0, 3))
    optimizer = OPTIMIZERS[name][0]([empty, other])
    teacher = torch.ones(3)
    optimizer.attach_teacher([teacher], [other], 0.5)
    for expected in (0.5, 0.25):
        empty.grad = torch.zeros(0)
        optimizer.step()
        assert torch.equal(teacher, torch.full((3,), expected))
