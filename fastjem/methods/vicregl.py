"""VICRegL: Bardes et al. 2022, arXiv 2210.01571."""

import torch
from torch import Tensor

from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.kernels.augment import columns as column
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.transformer import rows_and_columns
from fastjem.nn.covariance import VICRegLLoss
from fastjem.nn.parts import MLP


class _OfPlacesInOrder(VICRegLLoss):
    """With the chosen places in the map's order, as main_vicregl.py has them."""

    in_their_order = True


class VICRegL(Method):
    """VICReg of whole views, and of the places of their feature maps: a place is like the one nearest to it in the
    image, and like the one with the most similar features, in another view.

    alpha: weight of whole views; places have the rest.
    matches: of how many places of a large view the partners in the other view are looked for, and small_matches the
        other way around.
    norm: of both heads; "auto" is batch norm if the encoder has it, and layer norm otherwise.
    """

    about = About("decorrelation", "variance kept above 1, covariance below", "Bardes et al. 2022, arXiv 2210.01571")
    views = Views(large=2, small=6, recipe="vicregl")
    combines = frozenset({"large_views"})
    projector_options = ("hidden",)
    defaults = Defaults(
        "adamw",
        5e-4 * 2**0.5,
        0.05,
        drop_path=0.1,
        source="main_vicregl.py, ConvNeXt: AdamW, 1e-3 at batch 512, wd 0.05",
    )
    refuses = {
        "mask": "looks for each place of a whole feature map in another view's",
    }
    presets = {
        "resnet": Preset(
            "README, ResNet-50: LARS, 0.6 at batch 512, wd 1e-6; two large views alone",
            Defaults("lars", 0.6 / 2**0.5, 1e-6),
            views={"small": 0, "recipe": "vicreg"},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        local_hidden: int = 512,
        local_dim: int = 512,
        alpha: float = 0.75,
        matches: int = 20,
        small_matches: int = 4,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        norm: str = "auto",
    ):
        super().__init__(width, run)
        ranges.not_negative("vicregl", invariance=invariance, variance=variance, covariance=covariance)
        ranges.shares("vicregl", alpha=alpha)
        if norm == "auto":
            norm = "batch" if run.batch_norm else "layer"
        hidden = hidden or 4 * width  # as VICReg's
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, hidden), norm=norm, last_bias=False)
        self.local_projector = MLP(width, local_hidden, local_hidden, local_dim, norm=norm, last_bias=False)
        self.criterion = _OfPlacesInOrder(
            invariance,
            variance,
            covariance,
            alpha,
            gather_distributed=run.group is not None,
            num_matches=(matches, small_matches),
        )

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        features = []
        grids = []
        for view, table in zip(batch.views, batch.tables, strict=True):
            encoded = student.encode([view], tokens=True)
            assert encoded.tokens is not None  # as they are asked for
            rows, columns = rows_and_columns(encoded)
            local = student.local_projector(encoded.tokens.flatten(0, 1)).unflatten(0, (-1, rows, columns))
            features.append((student.projector(encoded.pooled), local))
            grids.append(places(table, rows, columns))
        student.note(projection=features[0][0].detach())
        large = self.views.large
        if len(features) == large:
            return self.criterion(features, grids)
        return self.criterion(features[:large], grids[:large], features[large:], grids[large:])


def places(table: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows, columns, 2]: where in its image, in pixels, the middle of each place of a view's map is: (x, y).

    table: [B, P], how the views were cut (`fastjem.kernels.augment.columns`).
    """
    down, across = (
        (torch.arange(count, device=table.device, dtype=table.dtype) + 0.5) / count for count in (rows, columns)
    )
    across = torch.where(table[:, column.FLIP, None] > 0, 1 - across, across)  # [B, columns]
    x = table[:, column.LEFT, None] + across * table[:, column.WIDTH, None]
    y = table[:, column.TOP, None] + down * table[:, column.HEIGHT, None]
    return torch.stack([x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], 3)
