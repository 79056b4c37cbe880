"""CLIP's loss on a GPU: see contrastive.py for the composition, similarity.py for the kernels."""

from fastjem.kernels import contrastive, reference, similarity


def clip_loss(*arguments):
    if not similarity.supported(*arguments[:2]):
        return reference.clip_loss(*arguments)
    return contrastive.clip_loss(similarity, *arguments)


def clip_loss_backward(*arguments):
    if not similarity.supported(*arguments[:2]):
        return reference.clip_loss_backward(*arguments)
    return contrastive.clip_loss_backward(similarity, *arguments)
