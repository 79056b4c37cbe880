"""The operator table: each operator's schema, once, and which implementation PyTorch's dispatcher finds for it.

`CompositeExplicitAutograd` is the reference (plain torch, any device), `CPU` the C++ kernel, `CUDA` the Triton kernel.
The reference is the fake kernel as well, so torch.compile works with any of them. Operators never differentiate:
`autograd.py` turns them into losses, and `fastjem.functional` is what users call.

To add an operator, see docs/adding-an-op.md.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

try:
    from fastjem.kernels import reference
except ModuleNotFoundError as error:
    raise ImportError(
        "fastjem is not installed: Python found its source folder, but kernels/ becomes fastjem.kernels only by "
        "installing. Run `pip install -e .` in the source folder, or leave it if fastjem is installed."
    ) from error

# One pass: (Tensor loss, Tensor[] gradients, Tensor scale), and last among the arguments which gradients are wanted.
# Two passes: name and name_backward. See the conventions in kernels/reference.py.
SCHEMAS = {
    "rescale_": "(Tensor(a!) gradient, Tensor factor) -> ()",
    "ema_update_": "(Tensor(a!)[] teacher, Tensor[] student, Tensor momentum) -> ()",
    "cross_entropy": "(Tensor logits, Tensor labels, int ignore_index, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
    "negative_cosine": "(Tensor p, Tensor z, float eps, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
    "regression": "(Tensor prediction, Tensor target, float beta, bool normalize, float eps, bool[] wanted)"
    " -> (Tensor, Tensor[], Tensor)",
    "nt_xent": "(Tensor rows, Tensor candidates, int offset, float temperature, bool decoupled, bool normalize)"
    " -> (Tensor, Tensor)",
    "nt_xent_backward": "(Tensor rows, Tensor candidates, Tensor rows_lse, Tensor candidates_lse, Tensor? weights,"
    " int offset, float temperature, bool decoupled, bool normalize) -> Tensor",
    "info_nce": "(Tensor query, Tensor positive, Tensor negatives, int offset, float temperature, bool[] wanted)"
    " -> (Tensor, Tensor[], Tensor)",
    "clip_loss": "(Tensor x, Tensor y, Tensor logit_scale, int offset) -> (Tensor, Tensor, Tensor)",
    "clip_loss_backward": "(Tensor x, Tensor y, Tensor logit_scale, Tensor x_lse, Tensor y_lse, int offset,"
    " bool[] wanted) -> (Tensor[], Tensor)",
    "siglip_loss": "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, int offset, bool[] wanted)"
    " -> (Tensor, Tensor[], Tensor, Tensor)",
    "nearest_neighbors": "(Tensor query, Tensor bank) -> Tensor",
    "sinkhorn_step": "(Tensor scores, Tensor? bias, float epsilon) -> Tensor",
    "sinkhorn_bias": "(Tensor scores, float epsilon, int iterations, bool normalize_samples_first) -> Tensor",
    "sinkhorn": "(Tensor scores, float epsilon, int iterations, bool normalize_samples_first, ScalarType dtype)"
    " -> Tensor",
    "sinkhorn_codes": "(Tensor scores, Tensor bias, float epsilon, ScalarType dtype) -> Tensor",
    "prototype_cross_entropy": "(Tensor[] student, Tensor[] teacher, float student_temperature,"
    " float teacher_temperature, Tensor? teacher_bias, str pairs, Tensor? weights, bool statistics, bool[] wanted)"
    " -> (Tensor, Tensor[], Tensor, Tensor[])",
    "prototype_head_cross_entropy": "(Tensor[] inputs, Tensor[] teacher, Tensor teacher_prototypes,"
    " float student_temperature, float teacher_temperature, Tensor? teacher_bias, str pairs, Tensor? weights,"
    " bool[] wanted) -> (Tensor, Tensor[], Tensor)",
    "mean_entropy": "(Tensor[] scores, float temperature, Tensor? total, Tensor? rows, bool[] wanted)"
    " -> (Tensor, Tensor[], Tensor)",
    "koleo": "(Tensor x, float p, float eps, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
    "barlow_twins": "(Tensor z0, Tensor z1, float lambda_param, int statistics, bool[] wanted)"
    " -> (Tensor, Tensor[], Tensor, Tensor[])",
    "characteristic": "(Tensor theta, int frequencies) -> Tensor",
    "characteristic_backward": "(Tensor theta, Tensor weights) -> Tensor",
    "augment": "(Tensor images, Tensor parameters, float[] mean, float[] std, ScalarType dtype, bool channels_last,"
    " bool exact, float threshold) -> Tensor",
    "crop_resize": "(Tensor images, Tensor indices, Tensor parameters, int size, bool bicubic) -> Tensor",
    "vicreg": "(Tensor z0, Tensor z1, float lambda_param, float mu_param, float nu_param, float eps,"
    " int statistics, bool[] wanted) -> (Tensor, Tensor[], Tensor, Tensor[])",
}

LIBRARY = torch.library.Library("fastjem", "DEF")


def plain(implementation: Callable) -> Callable:
    """Run without autograd and autocast: inside a Python kernel both still act (autocast makes `@` bfloat16)."""

    @functools.wraps(implementation)
    def run(*args):
        # By hand, as the two context managers take longer than a small loss (5 of 30 us).
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if not torch._C._is_any_autocast_enabled():
                return implementation(*args)
            with torch._C._DisableAutocast():
                return implementation(*args)
        finally:
            torch._C._set_grad_enabled(before)

    return run


def _cpu_kernels():
    """The module of C++ kernels, or the reason why there is none."""
    try:
        return importlib.import_module("fastjem.kernels.cpu"), None
    except ImportError as error:
        return None, f"the C++ extension doesn't load ({error}); it is built at installation if there is a C++ compiler"


def triton_launcher(name: str) -> tuple[Callable | None, str | None]:
    """The Triton launcher of an operator, whose file is imported at the first call, or the reason why there is none."""
    module = name.removesuffix("_").removesuffix("_backward")  # nt_xent_backward lives in nt_xent.py
    module = "sinkhorn" if name.startswith("sinkhorn_") else module
    if importlib.util.find_spec(f"fastjem.kernels.{module}") is None:
        return None, "no Triton kernel yet"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"

    def launch(*args):
        return getattr(importlib.import_module(f"fastjem.kernels.{module}"), name)(*args)

    return launch, None


_IMPLEMENTATIONS: dict[str, dict[str, str]] = {}


def _register() -> None:
    cpu, no_cpu = _cpu_kernels()
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema)
        specification = plain(getattr(reference, name))
        LIBRARY.impl(name, specification, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastjem::{name}", specification, lib=LIBRARY)
        if on_cpu := getattr(cpu, name, None):
            LIBRARY.impl(name, plain(on_cpu), "CPU")
        on_cuda, no_cuda = triton_launcher(name)
        if on_cuda:
            LIBRARY.impl(name, plain(on_cuda), "CUDA")
        _IMPLEMENTATIONS[name] = {
            "cpu": "C++" if on_cpu else f"reference ({no_cpu or 'no C++ kernel yet'})",
            "cuda": "Triton" if on_cuda else f"reference ({no_cuda})",
        }


_register()


def implementations() -> dict[str, dict[str, str]]:
    """For each operator, what runs on "cpu" and on "cuda": "C++", "Triton", or "reference (why)"."""
    return {name: dict(where) for name, where in _IMPLEMENTATIONS.items()}
