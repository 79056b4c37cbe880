"""The tests bite: a kernel broken in one place fails them. See mutations.py."""

import shutil

import mutations_of_batches
import mutations_of_masks
import pytest
from conftest import _C, INTERPRETING
from mutations import CPU, INTERPRETER, REFERENCE, ROOT, Mutation, run


def but_one_exhaustive(mutations: list[Mutation]) -> list:
    return [pytest.param(m, id=str(m), marks=pytest.mark.exhaustive if i else ()) for i, m in enumerate(mutations)]


MUTATIONS = but_one_exhaustive(REFERENCE + mutations_of_masks.REFERENCE)
if _C and shutil.which("g++"):
    MUTATIONS += but_one_exhaustive(CPU + mutations_of_masks.CPU)


def assert_caught(result) -> None:
    assert result.returncode == 1, f"the broken kernel was not noticed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    # a failed comparison, not a function that the mutated extension lacks
    assert "AssertionError" in result.stdout and "AttributeError" not in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("mutation", REFERENCE + CPU + INTERPRETER + mutations_of_batches.INTERPRETER, ids=str)
def test_what_is_to_be_broken_is_there(mutation):
    """Most of them are exhaustive: a line that has moved would be seen long after."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_caught(mutation, tmp_path):
    assert_caught(run(mutation, tmp_path))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "mutation", but_one_exhaustive(INTERPRETER + mutations_of_batches.INTERPRETER + mutations_of_masks.INTERPRETER)
)
def test_a_broken_triton_kernel_is_caught(mutation, tmp_path):
    if not INTERPRETING:
        pytest.skip("runs with the interpreter")
    assert_caught(run(mutation, tmp_path, interpreter=True))
