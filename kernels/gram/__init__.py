"""The difference between two Gram matrices of patches: DINOv3's Gram anchoring."""

from ..table import Operator

OPERATORS = {
    "gram_loss": Operator(
        "(Tensor student, Tensor teacher, bool normalize, str negatives, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
        tiles=("cpu",),
    )
}
