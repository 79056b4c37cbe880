"""data2vec: Baevski et al. 2022, arXiv 2202.03555, for images."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from fastjem.data.masks import SAMPLERS, hidden_patches, visible
from fastjem.data.views import Views
from fastjem.errors import nearest
from fastjem.methods._parts import Defaults, Parts


class Data2Vec(nn.Module):
    """The student sees an image with blocks of its patches replaced by a mask token, and predicts at those patches the
    momentum encoder's representation of the whole image: the mean of its top layers, layer-normalised.

    mask: the share of the patches that is hidden; masking: how, a name in `fastjem.data.masks.SAMPLERS`.
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
        masking: str = "even_block",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        if not 0 < mask < 1:
            raise ValueError(f"data2vec: mask must be a share between 0 and 1, got {mask}")
        if masking not in SAMPLERS:
            raise nearest("masking", masking, SAMPLERS)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.projector = nn.Linear(width, width)
        self.layers, self.beta, self.mask, self.masking = layers, beta, mask, masking

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = tokens(teacher.encoder, views[0])[-self.layers :]
            target = sum(layer_norm(x.float(), x.shape[-1:]) for x in outputs) / len(outputs)
            target = layer_norm(target, target.shape[-1:])  # [B, L, D]
            size = grid(teacher.encoder, views[0])
            hidden = SAMPLERS[self.masking](len(target), size, self.mask, device=target.device)
            masked = visible(~hidden, hidden_patches(size, self.mask))  # [B, M]
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
