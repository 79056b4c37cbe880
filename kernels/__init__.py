"""fastjem's operators: plain torch (`reference`), C++ on the CPU (`cpu`), Triton on CUDA (one file per operator).

This package knows nothing of the rest of fastjem and is reached through `fastjem.ops`. Its folder stands at the root
of the repository, yet it is importable only as `fastjem.kernels`.
"""

if __name__ != "fastjem.kernels":
    raise ImportError(
        f"this folder is the package fastjem.kernels and can't be imported as {__name__!r}. "
        "Install the project (pip install -e .) and use `import fastjem`; single kernels are at `fastjem.kernels`."
    )
