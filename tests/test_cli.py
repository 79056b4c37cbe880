"""`fastjem doctor` and the command line around it."""

import json
import subprocess
import sys
import types

import pytest
import torch

from fastjem import __version__, ops
from fastjem.cli import main
from fastjem.commands import doctor


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastjem {__version__}\n"
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == help_text
    assert "doctor" in help_text and "bench" in help_text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["docter"], "did you mean doctor?"),
        (["benhc"], "did you mean bench?"),
        (["xyz"], "there are pretrain, "),
    ],
)
def test_unknown_command(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert says in err


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--jsno"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--jsno" in err


def test_bench_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("fastjem.commands.bench")
    fake.main = lambda argv: 3 if argv == ["--out", "folder"] else 1
    monkeypatch.setitem(sys.modules, "fastjem.commands.bench", fake)
    assert main(["bench", "--out", "folder"]) == 3


def test_doctor_runs_as_a_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastjem", "doctor", "--json"], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["versions"]["fastjem"] == __version__
    assert found["operators"] == ops.implementations()
    assert found["import_milliseconds"] > 0
    assert found["machine"]["threads"] >= 1
    assert found["gpu"]["devices"] or found["gpu"]["problem"]


def report(**changes: object) -> dict:
    """A healthy machine's report, with changes."""
    healthy = {
        "versions": {"fastjem": "1.2", "python": "3.12.1", "torch": "2.11.0", "timm": None},
        "import_milliseconds": 20.0,
        "machine": {"platform": "Linux", "cpu": "Some CPU", "threads": 2, "cpp_kernels": "AVX2"},
        "gpu": {
            "build": "CUDA",
            "operators": None,
            "cuda": "13.0",
            "driver": "580.1",
            "devices": [{"name": "H100", "capability": "9.0", "memory_gib": 79.2, "problem": None}],
            "problem": None,
        },
        "dali": {"packages": {"nvidia-dali-cuda130": "2.4.0"}, "cpu_problem": None, "gpu_problem": None},
        "operators": {"ema_update_": {"cpu": "C++", "cuda": "Triton"}},
    }
    return {**healthy, **changes}


def test_doctor_in_words() -> None:
    text = doctor.render(report())
    for words in (
        "timm",
        "not installed",
        "H100, capability 9.0, 79.2 GiB",
        "13.0, driver 580.1",
        "20 ms beyond torch",
    ):
        assert words in text
    assert text.splitlines()[-1].split() == ["ema_update_", "C++", "Triton"]


@pytest.mark.parametrize(
    ("versions", "build"),
    [({"cuda": "13.0"}, "CUDA"), ({"hip": "6.4"}, "ROCm"), ({"xpu": "20250301"}, "XPU"), ({}, "CPU")],
)
def test_other_accelerators_run_the_reference_by_rule(
    versions: dict[str, str], build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, name, versions.get(name))
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    found = doctor.gpu()
    assert found["build"] == build
    text = doctor.render(report(gpu=found))
    assert ("plain torch, the reference, by rule" in text) == (build in ("ROCm", "XPU"))


def test_a_rocm_build_has_no_triton_launchers() -> None:
    """torch calls ROCm's devices "cuda": without a rule they would get what was written for another chip."""
    code = (
        "import json, torch\n"
        "torch.version.hip, torch.version.cuda = '6.4', None\n"
        "from fastjem import ops\n"
        "print(json.dumps([on['cuda'] for on in ops.implementations().values()]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    where = json.loads(run.stdout)
    assert where and all(on.startswith("reference (") for on in where)
    assert sum("ROCm" in on for on in where) > 20


def test_mps_runs_the_reference_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, name, None)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    lines = doctor.render(report(gpu=doctor.gpu())).splitlines()
    assert [line.split() for line in lines if line.startswith("on MPS")] == [
        ["on", "MPS", "operators", "are", "plain", "torch,", "the", "reference,", "by", "rule"]
    ]


def test_a_reason_is_said_once() -> None:
    why = "the C++ extension doesn't load (No module named 'x'); it is built at installation"
    has = {f"op{i}": {"cpu": f"reference ({why})", "cuda": "Triton"} for i in range(13)}
    text = doctor.render(report(operators=has))
    assert text.count(why) == 1
    assert text.count("reference [1]") == 13


def test_a_broken_part_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu() -> None:
        raise OSError("libcuda is not what it was\nand more")

    def operators() -> None:
        raise ImportError("fastjem is not installed")

    monkeypatch.setattr(
        doctor, "SECTIONS", (doctor.versions, doctor.import_milliseconds, doctor.machine, gpu, operators)
    )
    found = doctor.report()
    assert found["gpu"] == {"problem": "OSError: libcuda is not what it was"}
    text = doctor.render({**found, "dali": {"packages": {}, "problem": "not installed"}})
    assert "none: OSError: libcuda is not what it was" in text
    assert text.endswith("operators: ImportError: fastjem is not installed")


def test_dali_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DALI_PROBE", "import os; os.abort()")
    assert doctor._dali_problem("cpu") == "a small pipeline ended with status -6"
    monkeypatch.setattr(doctor, "DALI_PROBE", "raise RuntimeError('no driver')")
    assert doctor._dali_problem("cpu") == "RuntimeError: no driver"
    text = doctor.render(report(dali={"packages": {"d": "1"}, "cpu_problem": None, "gpu_problem": "no driver"}))
    assert "DALI on CPU   works" in text and "doesn't work: no driver" in text


def test_methods_says_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    from fastjem.commands.methods import needs
    from fastjem.methods import METHODS, options_of

    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS) and "2006.07733" in out
    for name, kind in METHODS.items():
        assert main(["methods", name]) == 0
        one = capsys.readouterr().out
        assert all(f"  {option} = " in one for option in options_of(kind)), name
        assert kind.about.paper in one and kind.defaults.source in one
    assert main(["methods", "simcrl"]) == 2
    assert "no method 'simcrl'; did you mean simclr" in capsys.readouterr().err
    needed = {name: needs(kind) for name, kind in METHODS.items()}
    assert needed["simclr"] == "-" and needed["swav"] == "multi-crop" and needed["moco"] == "momentum encoder, queue"
    assert needed["data2vec"] == "momentum encoder, vision transformer"
