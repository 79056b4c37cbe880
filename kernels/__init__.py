"""fastjem's operators by family: plain torch (`reference`), C++ on the CPU (`cpu`), Triton on CUDA (`gpu`).

A family is a folder. Its `__init__.py` has the schemas of its operators and says which of them `cpu.py` and `gpu.py`
have; `fastjem.ops` registers all families named here. Importing a family imports no Triton.

Conventions of operators
------------------------
* Arithmetic is in float32, or in float64 where the inputs are float64. Losses come out 0-dim in that dtype, gradients
  in the dtype of their input.
* A loss whose gradients can be had in the same pass returns `(loss, gradients, scale)`: a gradient for each
  differentiable input, empty where the last argument, `wanted`, says no. The gradient of the loss is
  `scale * gradient`; an implementation says how much of the scale (1 / N, 1 / temperature) is in its gradients. Of
  float16 none is, as it would vanish: there it is applied in backward, in float32. With all of it in the gradients
  backward reads them again only where the upstream gradient isn't 1. Some operators return a list of statistics too.
* A loss that needs a second pass is two operators, `name` and `name_backward`.
* `fastjem.functional` checks what users pass, and tells them of it. What a kernel would read or write beyond is refused
  by `guard.py` as well, as an operator may be called directly.
* A specification (`reference.py`) is a few lines of plain torch, written to be read. It is the fallback where no faster
  implementation exists and the fake kernel that torch.compile traces. The tests' oracle (in float64) and the
  benchmarks' baseline are formulas of their own: `eager` of each case in tests/cases.py.

Letters: V views, S student views, T teacher views, N rows, B batch, D width, K prototypes or classes, M columns.

This package knows nothing of the rest of fastjem and is reached through `fastjem.ops`. Its folder stands at the root
of the repository, yet it is importable only as `fastjem.kernels`.
"""

if __name__ != "fastjem.kernels":
    raise ImportError(
        f"this folder is the package fastjem.kernels and can't be imported as {__name__!r}. "
        "Install the project (pip install -e .) and use `import fastjem`; single kernels are at `fastjem.kernels`."
    )

FAMILIES = (
    "augment",
    "contrastive",
    "covariance",
    "gaussian",
    "gram",
    "masks",
    "neighbors",
    "optimizers",
    "predictive",
    "prototypes",
    "supervised",
    "weights",
)
