"""Whether an installed fastjem works here: `python smoke.py --kernels C++|reference`. Needs torch, and no test package.

For wheels, in an environment that has nothing else: imports, the command line, two losses against plain torch in value
and gradient with torch's threads and the C++ kernels' in turns, and how many OpenMP runtimes the process has.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastjem
import fastjem.functional as F
import fastjem.nn
import fastjem.optim
from fastjem.ops import implementations


def runtimes() -> set[str]:
    """The files of GNU OpenMP runtimes in this process; None known away from Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}


def check_nt_xent() -> None:
    z = torch.randn(2, 512, 64, requires_grad=True)
    loss = F.nt_xent(z[0], z[1], temperature=0.2)
    rows = torch.nn.functional.normalize(z.double().flatten(0, 1), dim=1)
    logits = (rows @ rows.T / 0.2).masked_fill(torch.eye(1024, dtype=torch.bool), -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, (torch.arange(1024) + 512) % 1024)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    of_ours, of_theirs = torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0]
    torch.testing.assert_close(of_ours, of_theirs.float(), rtol=1e-3, atol=1e-7)


def check_vicreg() -> None:
    z = torch.randn(2, 64, 96, requires_grad=True)
    loss = F.vicreg(z[0], z[1])
    x = z.double()
    centred = x - x.mean(1, keepdim=True)
    squares = (centred.mT @ centred / 63) ** 2
    variance = torch.relu(1 - (centred.square().sum(1) / 63 + 1e-4).sqrt()).mean(1).mean()
    covariance = (squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)).sum() / 96
    expected = 25 * (x[0] - x[1]).square().mean() + 25 * variance + covariance
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    of_ours, of_theirs = torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0]
    torch.testing.assert_close(of_ours, of_theirs.float(), rtol=1e-3, atol=1e-7)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernels", choices=("C++", "reference"), required=True)
    wanted = parser.parse_args().kernels
    found = implementations()["nt_xent"]["cpu"]
    assert found.startswith(wanted), f"nt_xent on the CPU is {found}"
    torch.manual_seed(0)
    begin = time.perf_counter()
    for _ in range(5):  # in turns, as in training
        check_nt_xent()
        check_vicreg()
    seconds = time.perf_counter() - begin
    for words in (["--help"], ["--version"], ["doctor"]):
        command = [sys.executable, "-m", "fastjem", *words]
        said = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0 and "fastjem" in said.stdout, said
    libraries = runtimes()
    assert len(libraries) <= 1, libraries
    where = ", ".join(sorted(libraries)) or "unknown"
    print(
        f"fastjem {fastjem.__version__} at {Path(fastjem.__file__).parent}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}: {found}; losses and gradients right in "
        f"{seconds:.1f} s on {torch.get_num_threads()} threads; OpenMP: {where}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
