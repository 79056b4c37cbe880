"""As on macOS and Windows, as far as that can be had on Linux: without what only Linux or only POSIX has, without
Triton and without the C++ kernels every module is imported, and losses are those of the reference.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CODE = """
import builtins, importlib, os, pathlib, signal, sys
# Others' packages first: they look after themselves.
import matplotlib.pyplot, numpy, rich.console, safetensors.torch, sklearn.metrics, timm, torch, torchvision, tyro, yaml
import torch.distributed

GONE = {"fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "syslog", "triton"}
imported = builtins.__import__

def without(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__") or ""
    if level == 0 and name.partition(".")[0] in GONE and importer.partition(".")[0] == "fastjem":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return imported(name, globals, locals, fromlist, level)

class NoExtension:
    def find_spec(self, name, path=None, target=None):
        if name == "fastjem.kernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

builtins.__import__ = without
sys.meta_path.insert(0, NoExtension())
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGXCPU"):
    delattr(signal, name)
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "getuid", "geteuid", "mkfifo", "pread", "statvfs"):
    delattr(os, name)

import fastjem
failed = []
for folder, package in (("fastjem", "fastjem"), ("kernels", "fastjem.kernels")):
    for path in sorted(pathlib.Path(sys.argv[1], folder).rglob("*.py")):
        parts = path.relative_to(pathlib.Path(sys.argv[1], folder)).with_suffix("").parts
        name = ".".join([package, *parts]).removesuffix(".__init__")
        if "kernel_package" in name or name.endswith("__main__"):
            continue  # for Hugging Face's kernels, which gives it a namespace; a program
        try:
            importlib.import_module(name)
        except ImportError as error:
            # Launchers of Triton kernels and of C++, which nothing imports where these are not.
            launcher = name.startswith("fastjem.kernels.") and ("triton" in str(error) or "_C" in str(error))
            if not launcher:
                failed.append(f"{name}: {error!r}")
assert not failed, failed[:5]

import fastjem.functional as F
from fastjem.ops import implementations
assert implementations()["nt_xent"]["cpu"].startswith("reference ("), implementations()["nt_xent"]
z = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
loss = F.nt_xent(z[0], z[1], temperature=0.2)
rows = torch.nn.functional.normalize(z.flatten(0, 1), dim=1)
logits = (rows @ rows.T / 0.2).masked_fill(torch.eye(18, dtype=torch.bool), -torch.inf)
expected = torch.nn.functional.cross_entropy(logits, (torch.arange(18) + 9) % 18)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])

from fastjem.machine import available_cores
from fastjem.stopping import Stop
assert available_cores() >= 1
with Stop():
    pass
from fastjem.data import cache
with cache.alone(pathlib.Path(sys.argv[2], "file")):
    assert cache.is_made(pathlib.Path(sys.argv[2], "file"))
"""


def test_nothing_needs_linux_triton_or_cpp(tmp_path: Path) -> None:
    for package in ("timm", "torchvision", "tyro", "rich", "sklearn", "matplotlib", "safetensors", "yaml"):
        pytest.importorskip(package)
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(ROOT), str(tmp_path)],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
