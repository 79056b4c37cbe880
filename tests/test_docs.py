"""The Python that the README shows runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_table_of_what_is_there_is_true():
    from fastjem import ops

    for row in re.findall(r"^\| `.*$", (ROOT / "README.md").read_text(), re.MULTILINE):
        names, reference, cpu, cuda = (cell.strip() for cell in row.strip("|").split("|"))
        assert reference == "yes"
        for name in re.findall(r"`(\w+)`", names):
            assert ops.implementations()[name] == {
                "cpu": "C++" if cpu == "yes" else "reference (no C++ kernel yet)",
                "cuda": "Triton" if cuda == "yes" else "reference (no Triton kernel yet)",
            }, name
