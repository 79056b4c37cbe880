"""W-MSE: Ermolov et al. 2021, arXiv 2007.06346."""

import torch
from torch import Tensor

from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import symmetric
from fastjem.nn.parts import MLP
from fastjem.nn.spectral import WMSELoss


class WMSE(Method):
    """Whitened views are alike. Whitening, over random parts of the batch, makes all directions equally large.

    Parts are drawn from one rank's images, as in solo-learn: 256 of them are enough for a part. So several ranks are
    not one rank with all images, which would draw other parts.

    whitening_size: images of a part, halved until it divides the images of a rank's batch; at least twice `dim`.
    eps: shrinks the covariance to the identity: 0 is the paper's.
    """

    about = About("decorrelation", "embeddings are whitened", "Ermolov et al. 2021, arXiv 2007.06346")
    views = Views(large=2, recipe="wmse")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw", 2e-3 / 2**0.5, 1e-6, source="htdt/self-supervised, ImageNet-100: Adam, 2e-3 at batch 512, wd 1e-6"
    )
    presets = {
        "cifar": Preset(
            "htdt/self-supervised, README: Adam, 3e-3 at batch 512, wd 1e-6",
            Defaults("adamw", 3e-3 / 2**0.5, 1e-6),
            {"whitening_size": 128},
            {"recipe": "wmse_cifar"},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 1024,
        dim: int = 64,
        whitening_size: int = 256,
        iterations: int = 1,
        eps: float = 0.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.not_negative("wmse", eps=eps)
        widths = self.projector_widths(hidden, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm)
        size = whitening_size
        images = run.batch // run.ranks or size
        while images % size and size > 1:
            size //= 2
        if size < 2 * dim:
            raise ValueError(
                f"wmse: a part of the batch must have at least 2 dim = {2 * dim} images to be whitened, and {images} "
                f"images of a rank's batch, whitening_size={whitening_size} make parts of {size}"
            )
        # What is whitened with in evaluation isn't kept: the projector is dropped then.
        self.criterion = WMSELoss(dim, eps=eps, w_iter=iterations, w_size=size, track_running_stats=False)

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def whitened(z0: Tensor, z1: Tensor) -> Tensor:
            return self.criterion(torch.cat([z0, z1]))

        return symmetric(whitened, student, teacher, batch.views, self.views.large)
