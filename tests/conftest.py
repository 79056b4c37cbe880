"""Which tests run in which process, and the implementations that every operator test runs on.

* `pytest`: everything but the two below. With a GPU, operator tests run on it too.
* `TRITON_INTERPRET=1 pytest -m interpreter`: Triton's kernels on CPU tensors, through PyTorch's dispatcher. Triton
  reads the variable when it is imported, hence a process of its own.
* `pytest -m aot`: ahead-of-time compiles for several GPUs, with a stand-in for the GPU driver.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import specialisations
import torch
from torch._functorch import config as functorch_config

from fastjem import ops
from fastjem.ops import direct

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
MATRIX_PRODUCTS = {"nt_xent", "info_nce", "clip_loss", "siglip_loss", "siglip_pairs", "barlow_twins", "vicreg"}
MATRIX_PRODUCTS |= {
    "supcon",
    "prototype_head_cross_entropy",
    "similarity_logsumexp",
    "koleo",
    "kmeans_step",
    "gram_loss",
    "nearest_k",
}
HAS_GPU = torch.cuda.is_available() and not INTERPRETING
try:
    from fastjem.kernels import _C
except ImportError:
    _C = None
BEST_ISA = _C.isa() if _C else None

functorch_config.error_on_custom_op_aliasing = True  # as PyTorch has it where CI is set, and from 2.12 on
torch.set_num_threads(2)  # so that the threaded paths run on any machine


@dataclass(frozen=True)
class Implementation:
    name: str
    device: str = "cpu"
    isa: int | None = None

    def has(self, op: str) -> bool:
        where = ops.implementations()[op]
        device = {"reference": None, "c++": "cpu", "triton": "cuda"}[self.name]
        return device is None or not where[device].startswith("reference")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the dispatcher use this implementation for every operator that has it."""
        key = self.device.upper()
        # Only the best instruction set's functions are called past the dispatcher, so that both ways are tested.
        past_dispatcher = self.name == "c++" and self.isa == BEST_ISA
        direct_calls = nullcontext() if past_dispatcher else direct.off()
        with direct_calls, torch.library._scoped_library("fastjem", "IMPL") as library:
            if self.name == "reference":
                for name in ops.OPERATORS:
                    library.impl(name, ops.plain(ops.reference(name)), key, allow_override=True)
            if self.name == "triton" and specialisations.wanted():
                specialisations.register(library)
            elif self.name == "triton" and self.device == "cpu":
                for name in ops.OPERATORS:
                    launcher, _ = ops.triton_launcher(name)
                    if launcher:
                        library.impl(name, ops.plain(launcher), key, allow_override=True)
            if self.isa is None:
                with specialisations.specialising() if specialisations.wanted() else nullcontext():
                    yield
                return
            best = _C.isa()
            try:
                _C.use_isa(self.isa)
                yield
            finally:
                _C.use_isa(best)


def half_and_float32() -> list[torch.dtype]:
    half = torch.float16 if INTERPRETING else torch.bfloat16  # the interpreter computes bfloat16 products wrongly
    return [half, torch.float32]


def _interpret_products_as_tensor_cores_do() -> None:
    """float32 products, 8 columns at a time: added exactly, then to the float32 sum, as TF32's instruction does.

    numpy's blocked product adds in an order that depends on where an element stands: one element in nine of z @ z.T
    differs from its mirror image, and a contrastive gradient is made of both. At temperature 0.01 (nt_xent of
    3 x 20 x 24, 25 seeds) its RMS error is 1.2 to 1.9 times eager's with numpy's product.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    numpys = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.dtype.scalar != tl.float32:
            return numpys(self, a, b, d, *options)
        total, left, right = d.data.copy(), a.data.astype("float64"), b.data.astype("float64")
        for k in range(0, left.shape[1], 8):
            total += (left[:, k : k + 8] @ right[k : k + 8]).astype("float32")
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _interpret_maxima_as_a_gpu_does() -> None:
    """`tl.maximum` and `tl.minimum` of NaN and a number are the number, unless they are told otherwise."""
    import numpy as np
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    interpreter.InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)


if INTERPRETING:
    _interpret_products_as_tensor_cores_do()
    _interpret_maxima_as_a_gpu_does()


def implementations() -> list:
    if INTERPRETING:
        return [pytest.param(Implementation("triton"), id="triton-interpreter", marks=pytest.mark.interpreter)]
    if specialisations.wanted():
        return [pytest.param(Implementation("triton"), id="triton-cuda", marks=pytest.mark.gpu)]
    found = [pytest.param(Implementation("reference"), id="reference")]
    if _C:
        names = ("baseline", "avx2", "avx512")
        best = _C.isa()
        for isa in range(best + 1):
            marks = () if isa == best else pytest.mark.exhaustive  # a lesser chip's, which this one would never choose
            found.append(pytest.param(Implementation("c++", isa=isa), id=f"c++-{names[isa]}", marks=marks))
    if HAS_GPU:
        found.append(pytest.param(Implementation("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu))
        found.append(pytest.param(Implementation("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", implementations(), indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """One implementation, active."""
    with request.param.active():
        yield request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which a kernel doesn't write can't pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with fill_uninitialized_memory, which is on by default
    yield
    torch.use_deterministic_algorithms(before)


def _exists(item: pytest.Item) -> bool:
    """Whether the test's operator (its `op` or `case` parameter) has the implementation it would run on."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    op = parameters["case"].op if "case" in parameters else parameters.get("op")
    if INTERPRETING and "case" in parameters:
        # The interpreter computes bfloat16 products wrongly (errors of 1e10 in Triton 3.6).
        wrong = op in MATRIX_PRODUCTS and parameters.get("dtype") == torch.bfloat16
        if wrong or not parameters["case"].interpreted:
            return False
    return "implementation" not in parameters or op is None or parameters["implementation"].has(op)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("markexpr")

    def belongs(item: pytest.Item) -> bool:
        if INTERPRETING and item.get_closest_marker("interpreter") is None:
            return False
        return _exists(item) and ("aot" in expression or item.get_closest_marker("aot") is None)

    chosen = [belongs(item) for item in items]
    config.hook.pytest_deselected(items=[item for item, wanted in zip(items, chosen, strict=True) if not wanted])
    items[:] = [item for item, wanted in zip(items, chosen, strict=True) if wanted]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, which the test has for itself."""
    monkeypatch.setenv("FASTJEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
