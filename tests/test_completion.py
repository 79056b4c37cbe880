"""The scripts of `fastjem completion`: what real shells complete with them, where no Python is to be found."""

import dataclasses
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from fastjem.cli import COMMANDS, main
from fastjem.errors import UserError
from fastjem.methods import METHODS

shtab = pytest.importorskip("shtab")
completion = importlib.import_module("fastjem.completion")

# What is typed, and what is offered: exactly that.
OFFERED = {
    "fastjem pretr": {"pretrain"},
    "fastjem pretrain --method dinov": {"dinov2", "dinov3"},
    "fastjem methods dinov": {"dinov2", "dinov3"},
    "fastjem pretrain --device ": {"auto", "cpu", "cuda"},
    "fastjem pretrain --weights-of ": {"encoder", "teacher", "all"},
    "fastjem pretrain --batch": {"--batch-size"},
    "fastjem pretrain --no-bl": {"--no-blur"},
    "fastjem bench --dty": {"--dtype"},
    "fastjem completion ": {"bash", "zsh", "fish"},
    "fastjem evaluate runs/": {"runs/a", "runs/b"},
}
BASH = """
source script
offer() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _shtab_fastjem fastjem "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
  printf '%s\\n' "${COMPREPLY[@]}"
}
offer TYPED
"""


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: completion.script(shell) for shell in completion.SHELLS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("runs/a", "runs/b", "programs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "programs/ls").symlink_to(shutil.which("ls") or "/bin/ls")  # fish lists files with it
    return tmp_path


def said(program: list[str], folder: Path) -> set[str]:
    """The lines of a shell that finds no other program than ls."""
    environment = {"PATH": str(folder / "programs"), "HOME": str(folder), "XDG_DATA_DIRS": str(folder)}
    run = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return {line.partition("\t")[0].removesuffix("/") for line in run.stdout.splitlines()}


def test_bash(scripts: dict[str, str], folder: Path) -> None:
    bash = shutil.which("bash") or pytest.skip("no bash")
    (folder / "script").write_text(scripts["bash"])
    for typed, offered in OFFERED.items():
        words = " ".join(f"'{word}'" for word in typed.split(" "))
        assert said([bash, "-c", BASH.replace("TYPED", words)], folder) == offered, typed


def test_fish(scripts: dict[str, str], folder: Path) -> None:
    fish = shutil.which("fish") or pytest.skip("no fish")
    (folder / "script").write_text(scripts["fish"])
    for typed, offered in OFFERED.items():
        assert said([fish, "--no-config", "-c", f"source script; complete -C '{typed}'"], folder) == offered, typed


def test_zsh_can_read_it(scripts: dict[str, str], folder: Path) -> None:
    zsh = shutil.which("zsh") or pytest.skip("no zsh")
    (folder / "script").write_text(scripts["zsh"])
    asked = "compdef() { print registered $1; }; source script; functions _shtab_fastjem | head -c 0"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    run = subprocess.run([zsh, "-fc", asked], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "registered _shtab_fastjem", run.stderr


def test_every_command_option_and_method_is_there(scripts: dict[str, str]) -> None:
    for shell, text in scripts.items():
        dashes = "-l " if shell == "fish" else "--"
        for name, command in COMMANDS.items():
            assert name in text, (shell, name)
            if not command.options:
                continue
            for field in dataclasses.fields(getattr(importlib.import_module(command.module), command.options)):
                if not field.metadata.get("positional"):
                    assert dashes + field.name.replace("_", "-") in text, (shell, name, field.name)
        assert all(method in text for method in METHODS), shell


def test_a_choice_is_what_the_help_lists() -> None:
    assert completion.listed("where: auto | cpu | cuda") == ("auto", "cpu", "cuda")
    assert completion.listed("auto | standard | small") == ("auto", "standard", "small")
    assert completion.listed("one thing, or another | as it is") == ()
    assert completion.listed("the run's") == ()


def test_without_shtab_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    with pytest.raises(UserError, match="shtab is not installed"):
        completion.script("bash")
    assert main(["completion", "bash"]) == 2
    assert "pip install 'fastjem[pretrain]'" in capsys.readouterr().err
