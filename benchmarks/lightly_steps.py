"""Steps as lightly's examples have them (examples/pytorch of lightly 1.6), on an encoder and views that are given.

Heads have the sizes of ours, losses and momentum updates are lightly's, the optimiser is torch's fused AdamW: what is
compared is everything around the encoder.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastjem.data.batch import Batch
from fastjem.encoders import Encoder
from fastjem.methods import Method
from fastjem.step import Step


class Theirs:
    """Modules with a loss of a batch's views, an optimiser, and momentum copies of some of them."""

    def __init__(self, modules: dict[str, nn.Module], loss: Callable[..., Tensor], copied: Sequence[str] = ()):
        self.modules = nn.ModuleDict(modules)
        self.teacher = nn.ModuleDict({name: copied_module(modules[name]).requires_grad_(False) for name in copied})
        self.loss = loss
        parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run(self, batch: Batch) -> None:
        from lightly.models.utils import update_momentum

        for name, module in self.teacher.items():
            update_momentum(self.modules[name], module, m=0.99)
        loss = self.loss(self, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def project(self, view: Tensor) -> Tensor:
        return self.modules["head"](self.modules["encoder"](view))

    @torch.no_grad()
    def project_momentum(self, view: Tensor) -> Tensor:
        return self.teacher["head"](self.teacher["encoder"](view))


def copied_module(module: nn.Module) -> nn.Module:
    """A deep copy; of weight_norm's computed weight, which deepcopy refuses, a new computation."""
    for part in module.modules():
        if hasattr(part, "weight_g"):
            part.weight = part.weight.detach()
    return copy.deepcopy(module)


class Pooled(nn.Module):
    """The encoder as lightly's examples call it: images -> embeddings."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.backbone = copy.deepcopy(encoder.backbone)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)


def head_of(method: Method) -> nn.Module:
    """A copy of our projector: the same layers, which lightly's heads have too."""
    return copy.deepcopy(dict(method.named_children())["projector"])


def two_views(loss_of: Callable[[], nn.Module]) -> Callable[[Step, int], Theirs]:
    def make(step: Step, size: int) -> Theirs:
        criterion = loss_of()

        def loss(self: Theirs, batch: Batch) -> Tensor:
            return criterion(self.project(batch.views[0]), self.project(batch.views[1]))

        return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss)

    return make


def simclr() -> nn.Module:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.1)


def dcl() -> nn.Module:
    from lightly.loss import DCLLoss

    return DCLLoss()


def barlow_twins() -> nn.Module:
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss()


def vicreg() -> nn.Module:
    from lightly.loss import VICRegLoss

    return VICRegLoss()


def frossl(step: Step, size: int) -> Theirs:
    from lightly.loss import FroSSLLoss

    criterion = FroSSLLoss()

    def loss(self: Theirs, batch: Batch) -> Tensor:
        return criterion([self.project(view) for view in batch.views])

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss)


def wmse(step: Step, size: int) -> Theirs:
    from lightly.loss import WMSELoss

    ours = step.method.criterion
    criterion = WMSELoss(ours.whitening.num_features, w_size=ours.w_size)

    def loss(self: Theirs, batch: Batch) -> Tensor:
        return criterion(torch.cat([self.project(view) for view in batch.views]))

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss)


def moco(step: Step, size: int) -> Theirs:
    from lightly.loss import NTXentLoss

    queue = step.method.queue.rows.shape
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=tuple(queue))

    def loss(self: Theirs, batch: Batch) -> Tensor:
        return criterion(self.project(batch.views[0]), self.project_momentum(batch.views[1]))

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss, ("encoder", "head"))


def byol(step: Step, size: int) -> Theirs:
    from lightly.loss import NegativeCosineSimilarity

    criterion = NegativeCosineSimilarity()
    predictor = copy.deepcopy(step.method.predictor)

    def loss(self: Theirs, batch: Batch) -> Tensor:
        x0, x1 = batch.views
        p0 = self.modules["predictor"](self.project(x0))
        z0 = self.project_momentum(x0)
        p1 = self.modules["predictor"](self.project(x1))
        z1 = self.project_momentum(x1)
        return 0.5 * (criterion(p0, z1) + criterion(p1, z0))

    modules = {"encoder": Pooled(step.encoder), "head": head_of(step.method), "predictor": predictor}
    return Theirs(modules, loss, ("encoder", "head"))


def simsiam(step: Step, size: int) -> Theirs:
    from lightly.loss import NegativeCosineSimilarity

    criterion = NegativeCosineSimilarity()
    predictor = copy.deepcopy(step.method.predictor)

    def loss(self: Theirs, batch: Batch) -> Tensor:
        z0, z1 = (self.project(view) for view in batch.views)
        p0, p1 = (self.modules["predictor"](z) for z in (z0, z1))
        return 0.5 * (criterion(z0.detach(), p1) + criterion(z1.detach(), p0))

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method), "predictor": predictor}, loss)


def swav(step: Step, size: int) -> Theirs:
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVPrototypes

    count, width = step.method.prototypes.weight.shape
    prototypes = SwaVPrototypes(width, count)
    criterion = SwaVLoss()

    def loss(self: Theirs, batch: Batch) -> Tensor:
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(self.project(view), dim=1)) for view in batch.views]
        return criterion(scores[:2], scores[2:]).sum()

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method), "prototypes": prototypes}, loss)


def dino(step: Step, size: int) -> Theirs:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    method = step.method
    count, bottleneck = method.prototypes.weight.shape
    hidden = method.projector[0].out_features
    head = DINOProjectionHead(method.width, hidden, bottleneck, count, batch_norm=method.run.batch_norm)
    criterion = DINOLoss(output_dim=count)

    def loss(self: Theirs, batch: Batch) -> Tensor:
        teacher = [self.project_momentum(view) for view in batch.views[:2]]
        student = [self.project(view) for view in batch.views]
        return criterion(teacher, student, epoch=0)

    return Theirs({"encoder": Pooled(step.encoder), "head": head}, loss, ("encoder", "head"))


def nnclr(step: Step, size: int) -> Theirs:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNMemoryBankModule

    bank = NNMemoryBankModule(size=tuple(step.method.queue.rows.shape))
    criterion = NTXentLoss(temperature=0.1)
    predictor = copy.deepcopy(step.method.predictor)

    def loss(self: Theirs, batch: Batch) -> Tensor:
        z0, z1 = (self.project(view) for view in batch.views)
        p0, p1 = (self.modules["predictor"](z) for z in (z0, z1))
        n0 = bank(z0.detach(), update=False)
        n1 = bank(z1.detach(), update=True)
        return 0.5 * (criterion(n0, p1) + criterion(n1, p0))

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method), "predictor": predictor}, loss)


def tico(step: Step, size: int) -> Theirs:
    from lightly.loss import TiCoLoss

    criterion = TiCoLoss()

    def loss(self: Theirs, batch: Batch) -> Tensor:
        return criterion(self.project(batch.views[0]), self.project_momentum(batch.views[1]))

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss, ("encoder", "head"))


def mmcr(step: Step, size: int) -> Theirs:
    from lightly.loss import MMCRLoss

    criterion = MMCRLoss()

    def loss(self: Theirs, batch: Batch) -> Tensor:
        online = torch.stack([self.project(view) for view in batch.views], 1)
        momentum = torch.stack([self.project_momentum(view) for view in batch.views], 1)
        return criterion(online, momentum)

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss, ("encoder", "head"))


def lejepa(step: Step, size: int) -> Theirs:
    from lightly.loss import LeJEPALoss

    criterion = LeJEPALoss()
    return _of_all_views(step, criterion)


def visreg(step: Step, size: int) -> Theirs:
    from lightly.loss import VISRegLoss

    criterion = VISRegLoss(num_slices=step.method.slices)
    return _of_all_views(step, criterion)


def _of_all_views(step: Step, criterion: nn.Module) -> Theirs:
    def loss(self: Theirs, batch: Batch) -> Tensor:
        large = step.method.views.large
        projections = [self.project(view) for view in batch.views]
        local = projections[large:] or projections[:large]  # without small views theirs needs some: the same again
        return criterion(local_proj=torch.stack(local), global_proj=torch.stack(projections[:large]))

    return Theirs({"encoder": Pooled(step.encoder), "head": head_of(step.method)}, loss)


THEIRS: dict[str, Callable[[Step, int], Theirs | None]] = {
    "simclr": two_views(simclr),
    "dcl": two_views(dcl),
    "barlow_twins": two_views(barlow_twins),
    "vicreg": two_views(vicreg),
    "frossl": frossl,
    "wmse": wmse,
    "moco": moco,
    "byol": byol,
    "simsiam": simsiam,
    "swav": swav,
    "dino": dino,
    "nnclr": nnclr,
    "tico": tico,
    "mmcr": mmcr,
    "lejepa": lejepa,
    "visreg": visreg,
}
