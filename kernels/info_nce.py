"""InfoNCE with given negatives on a GPU: see contrastive.py for the composition, similarity.py for the kernels."""

from fastjem.kernels import contrastive, reference, similarity


def info_nce(*arguments):
    if not similarity.supported(*arguments[:3]):
        return reference.info_nce(*arguments)
    return contrastive.info_nce(similarity, *arguments)
