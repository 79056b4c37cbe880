"""What methods of pairs of images have in common: one encoder, and a projection of each source's own."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastjem.methods.protocol import Branch


class PairHeads(nn.ModuleList):
    """A linear projection without bias for each of two sources (Radford et al. 2021, figure 3)."""

    def __init__(self, width: int, dim: int):
        super().__init__(nn.Linear(width, dim, bias=False) for _ in range(2))
        for head in self:
            nn.init.normal_(head.weight, std=width**-0.5)  # type: ignore[arg-type]


def embeddings_of_pairs(student: Branch, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, dim] each, of the views of the first source and of the second."""
    first, second = student.encode(views).pooled.chunk(2)
    x = student.projectors[0](first)
    y = student.projectors[1](second)
    student.note(projection=x.detach())
    return x, y
