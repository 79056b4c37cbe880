"""docs/notebooks: clean, and each runs from its first cell to its last in a kernel of its own, on small settings."""

import ast
import json
import re
from pathlib import Path

import pytest
from images import make_folder

nbformat = pytest.importorskip("nbformat")
FOLDER = Path(__file__).parent.parent / "docs/notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL = {
    "drop-in": {"FASTJEM_ROWS": "64", "FASTJEM_WIDTH": "16", "FASTJEM_STEPS": "3"},
    "photographs": {
        "FASTJEM_SIZE": "32", "FASTJEM_BACKBONE": "test_resnet", "FASTJEM_STEPS": "2", "FASTJEM_BATCH": "16",
        "FASTJEM_DATA": "photos",
    },
    "benchmark": {"FASTJEM_ROWS": "64", "FASTJEM_WIDTH": "16", "FASTJEM_CASE": "^negative_cosine 8 x 16 fp32$"},
}  # fmt: skip


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def test_all_are_run_here() -> None:
    assert sorted(SMALL) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_clean(name: str) -> None:
    """Without outputs, which belong to the machine of whoever ran it; every setting comes from the first code cell."""
    nbformat.validate(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert [i for i, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", [])] == [0]
    assert all("FASTJEM_" not in "".join(cell["source"]) for cell in code[1:])
    for cell in code:
        ast.parse("".join(cell["source"]))  # plain Python: no magics, so that it can be checked
    first = "".join(code[0]["source"])
    assert all(name in first for name in SMALL[name])
    for cell in cells(name):
        assert all(len(line.rstrip("\n")) <= 130 for line in cell["source"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_somewhere(name: str) -> None:
    text = "".join(line for cell in cells(name) if cell["cell_type"] == "markdown" for line in cell["source"])
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    for target in targets:
        assert (FOLDER / target).exists(), target


@pytest.mark.parametrize(
    "name", [name if name == "drop-in" else pytest.param(name, marks=pytest.mark.exhaustive) for name in NOTEBOOKS]
)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    make_folder(tmp_path / "photos", 48)
    for key, value in {**SMALL[name], "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    shown = [output["data"] for output in outputs if "data" in output]
    if name == "drop-in":
        assert "largest difference of a gradient 0.0e+00" in printed and "in 3 steps" in printed
        assert printed.count(" ms ") >= 2
    elif name == "photographs":
        pages = [data["text/html"] for data in shown if "text/html" in data]
        assert "finished in" in pages[0] and "<iframe srcdoc=" in pages[1] and "nearest neighbours" in pages[1]
        assert sum("image/png" in data for data in shown) == 2 and "by 20 neighbours" in printed
        assert (tmp_path / "runs/notebook/report.html").exists()
    else:
        assert "negative_cosine 8 x 16 fp32" in shown[0]["text/markdown"] and printed.count(" us\n") == 2
        assert "negative_cosine 4096 x 256 fp32" in printed
