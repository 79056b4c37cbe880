"""A step that comes to have a gradient for more parameters than those before it is no CUDA graph's."""

from collections.abc import Callable

import pytest
import torch
from recorder import Recorder
from test_methods import make
from test_step_graph import soon_captured, steps_of  # noqa: F401  a fixture of every test
from torch import Tensor, nn

from fastjem.data.batch import Batch
from fastjem.errors import UserError
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")


class Grows(nn.Module):
    """An encoder with a part that only some of its calls take."""

    def __init__(self, takes: Callable[[int], bool]) -> None:
        super().__init__()
        self.seen = 0
        self.takes = takes
        self.head = nn.Linear(3 * 32, 12)
        self.more = nn.Linear(12, 12)

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        x = self.head(images.mean(3).flatten(1))
        return x + self.more(x) if self.takes(self.seen) else x


def growing(first: int) -> Callable[[], tuple[Step, Batch]]:
    def made() -> tuple[Step, Batch]:
        step, batch = make("simclr")
        return Step(Grows(lambda seen: seen >= first), step.method), batch

    return made


@pytest.mark.parametrize("first", [2, 3])  # a step before the captured one, and the one that the graph is checked by
def test_a_step_that_reaches_more_parameters_is_refused(first: int) -> None:
    made = growing(first)
    expected, state, _ = steps_of("simclr", None, made=made)
    said: list[str] = []
    found, kept, by_graph = steps_of("simclr", Recorder, made=made, must=False, say=said.append)
    why = "not every step reaches the same parameters"
    assert by_graph.refused and said == [f"--cuda-graph auto: a step's kernels are launched one by one: {why}"]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(value, kept[key]) for key, value in state.items())
    with pytest.raises(UserError, match=f"--cuda-graph on: the step can't be captured: {why}"):
        steps_of("simclr", Recorder, made=made)
