"""fastjem's operators by family: plain torch (`reference`), C++ on the CPU (`cpu`), Triton on CUDA (`gpu`).

A family is a folder. Its `__init__.py` has the schemas of its operators and says which of them `cpu.py` and `gpu.py`
have; `fastjem.ops` registers all families named here. Importing a family imports no Triton.

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
    "predictive",
    "prototypes",
    "supervised",
    "weights",
)
