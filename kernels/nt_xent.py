"""NT-Xent, DCL and SupCon's log-sum-exps on a GPU: see contrastive.py for the composition, similarity.py for the
kernels."""

from fastjem.kernels import contrastive, reference, similarity


def nt_xent(*arguments):
    if not similarity.supported(*arguments[:2]):
        return reference.nt_xent(*arguments)
    return contrastive.nt_xent(similarity, *arguments)


def nt_xent_backward(*arguments):
    if not similarity.supported(*arguments[:2]):
        return reference.nt_xent_backward(*arguments)
    return contrastive.nt_xent_backward(similarity, *arguments)
