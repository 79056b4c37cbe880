"""NT-Xent, Sinkhorn codes and the cross-entropy of softmaxes over prototypes: Triton on CUDA, plain torch elsewhere.

Written by `fastjem kernels` from the sources of fastjem.
"""

from .functions import nt_xent, prototype_cross_entropy, sinkhorn

__all__ = ["nt_xent", "prototype_cross_entropy", "sinkhorn"]
