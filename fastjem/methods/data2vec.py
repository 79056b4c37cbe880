"""data2vec: Baevski et al. 2022, arXiv 2202.03555, for images."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts


class Data2Vec(nn.Module):
    """The student sees an image with blocks of its patches replaced by a mask token, and predicts at those patches the
    momentum encoder's representation of the whole image: the mean of its top layers, layer-normalised.
    """

    family, prevents_collapse = "masked prediction", "normalised targets of a momentum encoder"
    views = Views(large=1, recipe="data2vec", mask=0.75)
    ema = ("encoder",)
    pool = "avg"  # no loss reaches the class token directly: the patches' mean is the embedding
    defaults = Defaults("adamw", 7e-4, 0.05, clip=3.0, momentum=0.9998, final_momentum=0.9998, warmup_epochs=40,
                        source="section 4.1, released configuration: AdamW, 2e-3 at batch 2048, wd 0.05")  # fmt: skip

    def __init__(
        self,
        width: int,
        *,
        layers: int = 6,
        beta: float = 2.0,
        mask: float = 0.75,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        if not 0 < mask < 1:
            raise ValueError(f"data2vec: mask must be a share between 0 and 1, got {mask}")
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.projector = nn.Linear(width, width)
        self.layers, self.beta, self.mask = layers, beta, mask

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = tokens(teacher.encoder, views[0])[-self.layers :]
            target = sum(layer_norm(x.float(), x.shape[-1:]) for x in outputs) / len(outputs)
            target = layer_norm(target, target.shape[-1:])  # [B, L, D]
            masked = blocks(len(target), *grid(teacher.encoder, views[0]), self.mask, target.device)
        x = student.encoder.norm(tokens(student.encoder, views[0], masked, self.mask_token)[-1])
        student.seen["embedding"] = x.detach().mean(1)
        at = masked[..., None].expand(-1, -1, x.shape[-1])
        prediction = self.projector(x.gather(1, at)).float()
        student.seen["projection"] = prediction.detach().flatten(0, 1)[:: prediction.shape[1]]
        return smooth_l1_loss(prediction, target.gather(1, at), beta=self.beta)


def grid(vit: nn.Module, x: Tensor) -> tuple[int, int]:
    patch = vit.patch_embed.patch_size
    tall, broad = (patch, patch) if isinstance(patch, int) else patch
    return x.shape[-2] // tall, x.shape[-1] // broad


def blocks(
    images: int, height: int, width: int, share: float, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Indices [B, M] of the masked patches, M = share * height * width: rectangles of an aspect in 0.3 .. 1 / 0.3, one
    on another until enough is covered (BEiT, arXiv 2106.08254, algorithm 1); the same number in every image, no sync.

    A rectangle covers 8 % (BEiT's 16 patches of 196) to 40 % of the patches.
    """
    patches, rectangles = height * width, 32
    random = torch.rand(4, images, rectangles, 1, device=device, generator=generator)
    area, aspect = patches * (0.08 + 0.32 * random[0]), (1 / 0.3) ** (2 * random[1] - 1)
    tall, broad = (area * aspect).sqrt().round().clamp(1, height), (area / aspect).sqrt().round().clamp(1, width)
    top, left = (random[2] * height).floor(), (random[3] * width).floor()
    at = torch.arange(patches, device=device)
    row, column = at // width, at % width
    # Around the edges: inside them, as BEiT's, they would hide the centre of nearly every image.
    inside = ((row - top) % height < tall) & ((column - left) % width < broad)  # [B, 32, L]
    # The first rectangle over a patch is its turn; patches under none come last, and within a rectangle by lot.
    turn = torch.where(inside.any(1), inside.int().argmax(1), rectangles)
    turn = turn + torch.rand(images, patches, device=device, generator=generator)
    return turn.argsort(1)[:, : max(round(share * patches), 1)]


def tokens(vit: nn.Module, x: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> list[Tensor]:
    """Patch tokens [B, L, D] after every block; `masked` [B, M] patches are replaced before the positions are added."""
    x = vit.patch_embed(x)
    if masked is not None:
        shape, flat = x.shape, x.flatten(1, -2)  # [B, H, W, D] with dynamic image sizes
        hidden = torch.zeros(flat.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, masked, True)
        x = torch.where(hidden[..., None], mask_token.to(flat.dtype), flat).view(shape)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    outputs = []
    for block in vit.blocks:
        x = block(x)
        outputs.append(x[:, vit.num_prefix_tokens :])
    return outputs
