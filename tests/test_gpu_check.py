"""`make gpu-check`'s runner, on tests that need no GPU: some fail, die, hang or lose their GPU."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest

RUNNER = Path(gpu_check.__file__)
GOOD = """
import pytest

@pytest.mark.parametrize("i", range(6))
def test_good(i, implementation=None):
    pass

def test_skipped(implementation=None):
    pytest.skip("needs two GPUs")
"""
BAD = """
import os, signal, time

def test_before(implementation=None):
    pass

def test_wrong(implementation=None):
    assert 1 + 1 == 3

def test_dies(implementation=None):
    os.kill(os.getpid(), signal.SIGSEGV)

def test_after(implementation=None):
    pass
"""
SLOW = """
import time, pytest

@pytest.mark.parametrize("i", range(3))
def test_slow(i, implementation=None):
    time.sleep(60 if i == 1 else 0)
"""
LOST = """
import gpu_worker, pytest

@pytest.mark.parametrize("i", range(4))
def test_of_a_context(i, implementation=None):
    if i == 1:
        gpu_worker.gpu_answers = lambda: False
        assert False, "CUDA error: an illegal memory access"
    assert gpu_worker.gpu_answers()
"""
CANARIES = '''
import os, time, pytest

def test_01_slow_one():
    """The installation is whole. If it fails: nothing else counts."""
    time.sleep(0.5)

@pytest.mark.parametrize("loss", ["nt_xent", "clip"])
def test_03_products(loss):
    """bfloat16 products are right. If it fails: use float32."""
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "1"
    assert loss == "nt_xent", "off by 3"

def test_08a_memory():
    """No kernel reads beyond its tensors. If it fails: the kernel that it names."""
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
    pytest.skip("compute-sanitizer isn't there")
'''


def command(folder: Path, *words: str) -> list[str]:
    line = [sys.executable, str(RUNNER), *words, "--out", str(folder / "out"), "--tests", str(folder)]
    return [*line, "--mark", "", f"--pytest=--rootdir={folder}", "--pytest=-c/dev/null"]


def environment(folder: Path) -> dict[str, str]:
    """Temporary files, which a run that fails keeps, lie in `folder`."""
    given = {name: value for name, value in os.environ.items() if name != "CUDA_LAUNCH_BLOCKING"}
    return {**given, "TMPDIR": str(folder)}


def check(folder: Path, *words: str, **files: str) -> tuple[int, str, dict]:
    """Exit code, what was printed, and the JSON of the part."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    done = subprocess.run(command(folder, *words), capture_output=True, text=True, timeout=120, env=environment(folder))
    (file,) = (folder / "out").glob("gpu-*.json")
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text())


def outcomes(found: dict) -> dict[str, str]:
    return {nodeid.partition("::")[2]: test["outcome"] for nodeid, test in found["tests"].items()}


@pytest.mark.exhaustive
def test_every_test_runs_once_in_one_of_the_processes(tmp_path):
    code, said, found = check(tmp_path, "tests", "--processes", "3", good=GOOD)
    assert code == 0, said
    assert outcomes(found) == {**{f"test_good[{i}]": "passed" for i in range(6)}, "test_skipped": "skipped"}
    assert found["verdict"] == "passed" and (found["passed"], found["not run"]) == (6, 0)
    assert "skipped 1: needs two GPUs" in said and "tests" in said and str(tmp_path / "out") in said


def test_what_ends_a_process_costs_that_test_alone(tmp_path):
    """One dies, one never ends, and one leaves a context in which every later test would fail."""
    files = {"good": GOOD, "bad": BAD, "slow": SLOW, "lost": LOST}
    code, said, found = check(tmp_path, "tests", "--processes", "1", "--longest", "2", **files)
    assert code == 1 and found["verdict"] == "FAILED", said
    failed = {name: outcome for name, outcome in outcomes(found).items() if outcome == "failed"}
    assert failed.keys() == {"test_wrong", "test_dies", "test_slow[1]", "test_of_a_context[1]"}, said
    assert (found["passed"], found["skipped"], found["not run"], found["processes replaced"]) == (13, 1, 0, 3)
    assert "test_dies: its process ended with SIGSEGV" in said and "test_wrong: assert (1 + 1) == 3" in said
    assert "test_slow[1]: took more than 2 s" in said and "illegal memory access" in said


def test_out_of_time_leaves_what_there_is(tmp_path):
    class Short(gpu_check.Part):
        def progress(self, running: list[gpu_check.Process]) -> None:
            if self.counts["passed"]:
                self.seconds = 0

    (tmp_path / "test_slow.py").write_text(SLOW)
    (tmp_path / "claims").mkdir()
    arguments = [str(tmp_path / "test_slow.py"), f"--rootdir={tmp_path}", "-c/dev/null"]
    process = gpu_check.Process("worker", tmp_path, tmp_path / "claims", None, {}, arguments)
    part = Short("tests", tmp_path / "gpu-tests.json", [process], 60, 60)
    part.run()
    found = json.loads((tmp_path / "gpu-tests.json").read_text())
    assert (
        part.verdict == found["verdict"] == "OUT OF TIME"
        and process.handle is not None
        and process.handle.poll() is not None
    )
    assert (found["passed"], found["not run"], len(found["not run tests"])) == (1, 2, 2)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGKILL])
def test_whatever_ends_it_the_results_are_there(number, tmp_path):
    (tmp_path / "test_slow.py").write_text(SLOW)
    file = tmp_path / "out" / "gpu-tests.json"
    line = command(tmp_path, "tests", "--processes", "1")
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment(tmp_path)) as process:
        until = time.monotonic() + 60
        while not file.exists() or json.loads(file.read_text())["passed"] < 1:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    found = json.loads(file.read_text())
    assert (found["passed"], found["not run"]) == (1, 2)
    if number == signal.SIGKILL:
        assert found["verdict"] == "RUNNING"
        until = time.monotonic() + 10
        while _workers(tmp_path):
            assert time.monotonic() < until, "the runner's processes go on without it"
            time.sleep(0.1)
    else:
        assert process.returncode == 130 and found["verdict"] == "INTERRUPTED" and "1 passed" in said


def _workers(folder: Path) -> list[int]:
    """Those that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = (process / "cmdline").read_bytes()
            found += [int(process.name)] if b"gpu_worker" in words and str(folder).encode() in words else []
    return found


def test_a_process_that_is_killed_within_a_line_costs_that_line(tmp_path):
    process = gpu_check.Process("worker", tmp_path, None, None, {}, ["--version"])
    process.events.write_text('{"test": "a", "outcome": "passed"}\n{"test": "b", "out')
    assert [event["test"] for event in process.told()] == ["a"]
    process.start()
    assert process.handle is not None and process.handle.wait(60) == 0
    with process.events.open("a") as events:
        events.write('{"test": "c", "outcome": "passed"}\n')
    assert [event["test"] for event in process.told()] == ["c"]


def test_files_that_cannot_be_imported_are_failures(tmp_path):
    code, said, found = check(tmp_path, "tests", "--processes", "2", good=GOOD, none="import nothing  # implementation")
    assert code == 1 and found["failed"] == 1 and "No module named 'nothing'" in said


@pytest.mark.exhaustive
def test_nothing_to_run_is_no_pass(tmp_path):
    code, said, _ = check(tmp_path, "tests", "--processes", "1", "--pytest=-k", "--pytest=no_such", good=GOOD)
    assert code == 1 and "FAILED" in said


def test_canaries_say_in_their_order_what_they_decide(tmp_path):
    code, said, found = check(tmp_path, "canaries", gpu_canaries=CANARIES)
    lines = [line for line in said.splitlines() if line[:2].strip().isdigit()]
    assert lines[0].startswith(" 1 The installation is whole: ok (0.")
    assert lines[1].startswith(" 3 bfloat16 products are right (nt_xent): ok (")
    assert lines[2].startswith(" 3 bfloat16 products are right (clip): FAILED: AssertionError: off by 3")
    assert "use float32." in said and lines[3].endswith(": skipped: compute-sanitizer isn't there")
    assert code == 1 and (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)


def test_files_of_gpu_tests_alone_are_collected():
    names = {Path(path).name for path in gpu_check.files_with_gpu_tests(RUNNER.parent)}
    assert {"test_losses.py", "test_gpu.py", "test_bench.py"} <= names
    assert not names & {*gpu_check.OF_GPU_CHECK, "test_docs.py", "test_config_file.py"}
    assert all((RUNNER.parent / name).exists() for name in gpu_check.OF_GPU_CHECK)


def test_parts_fit_into_ten_minutes():
    """With the 90 seconds that the Makefile has for the build; `dali` is asked for alone."""
    makefile = (RUNNER.parents[1] / "Makefile").read_text()
    assert "timeout 90 $(PYTHON) -m pip install" in makefile
    assert 90 + sum(gpu_check.SECONDS[part] for part in ("canaries", "tests", "bench")) < 600


def test_benchmarks_end_in_time_and_with_their_verdict(monkeypatch, tmp_path):
    fake = tmp_path / "fastjem"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(
        "import sys, time\ntime.sleep(float(sys.argv[-1]))\nsys.exit(sys.argv[-1] == '0')"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    options = ["bench", "--out", str(tmp_path / "out")]

    def verdict(seconds: str, *more: str) -> str:
        return gpu_check.bench(gpu_check.parser().parse_args([*options, f"--bench={seconds}", *more]))

    assert verdict("0.01") == "passed" and verdict("0") == "FAILED (code 1)"
    assert verdict("60", "--seconds", "1") == "OUT OF TIME"


def test_dali_is_skipped_by_name_where_it_is_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "why_no_dali", lambda: "ModuleNotFoundError: No module named 'nvidia.dali'")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert gpu_check.main(["dali", "--out", str(tmp_path)]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "skipped: NVIDIA DALI: ModuleNotFoundError: No module named 'nvidia.dali'" in capsys.readouterr().out
