"""MoCo v2: He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, Queue, at_most, mlp, unit_keys


class MoCo(nn.Module):
    """The momentum encoder's key of the same image against a queue of keys of earlier batches.

    No shuffling batch norm: keys and queries of one batch share no statistics, as the encoders are called apart.
    """

    family, prevents_collapse = "contrastive", "a queue of earlier images pushes away"
    views = Views(large=2, recipe="mocov2")
    ema = ("encoder", "projector")
    defaults = Defaults("sgd", 0.03, 1e-4, momentum=0.999, final_momentum=0.999, warmup_epochs=0,
                        short=("lars", 1.2), least_momentum=0.99,
                        source="main_moco.py --mlp --moco-t 0.2 --aug-plus --cos")  # fmt: skip

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        norm: str = "none",
        images: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.projector = mlp(width, hidden or width, dim, norm=norm)
        self.queue = Queue(at_most(queue, images, each=4), dim)
        self.temperature, self.group = temperature, group

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        query = student.project(views[:1])
        with torch.no_grad():
            key = teacher.project(views[1:])
            keys = unit_keys(key, self.group)
            negatives = self.queue.begin(keys)
        loss = F.info_nce(query, key, negatives, temperature=self.temperature)
        self.queue.push(keys)
        return loss
