"""CAPI: Darcet et al. 2025, arXiv 2502.08769."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fastjem.data.batch import Batch
from fastjem.data.masks import hidden_indices, hidden_patches
from fastjem.data.philox import drawn_in_a_step
from fastjem.data.views import Views
from fastjem.functional.held import scores_fit
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_EACH_VIEW, OF_OWN_TARGETS
from fastjem.methods.transformer import TokenPredictor, grid_of
from fastjem.nn.capi import CAPILoss, PlaceCodes
from fastjem.nn.parts import Prototypes


class CAPI(Method):
    """The momentum encoder's patches are clustered as training goes, by Sinkhorn at each place of the grid; from the
    visible patches a small transformer predicts the clusters of some hidden ones.

    mask: the share of the patches that is hidden: all but a rectangle that goes around the edges.
    predicted: the share of the hidden patches that is predicted.
    """

    about = About(
        "masked prediction, clustering", "Sinkhorn's clusters are used equally", "Darcet et al. 2025, arXiv 2502.08769"
    )
    views = Views(large=1, recipe="capi", mask=0.65, masking="inverse_rectangle", drops=True)
    refuses = {
        **OF_OWN_TARGETS,
        **OF_EACH_VIEW,
        "projector": "has a predictor in the projector's place: --options predictor_width, predictor_depth",
    }
    momentum = ("encoder",)
    pool = "avg"  # no loss reaches the class token directly: the patches' mean is the embedding
    defaults = Defaults(
        "adamw",
        1e-3 / 64**0.5,
        0.1,
        momentum=0.999,
        warmup_epochs=10,
        drop_path=0.2,
        patch_embed_rate=0.2,
        source="default_pretrain_config.yaml: AdamW, 1e-3 at batch 16,384, wd 0.1; momentum encoder 0.999 to 1",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        clusters: int = 16384,
        temperature: float = 0.12,
        teacher_temperature: float = 0.06,
        iterations: int = 3,
        predictor_width: int = 0,
        predictor_depth: int = 12,
        predictor_heads: int = 0,
        mask: float = 0.65,
        predicted: float = 0.05,
    ):
        super().__init__(width, run)
        ranges.positive("capi", temperature=temperature, teacher_temperature=teacher_temperature)
        if not 0 < mask < 1 or not 0 < predicted <= 1:
            raise ValueError(f"capi: mask and predicted must be shares above 0, got {mask} and {predicted}")
        self.views = replace(self.views, mask=mask)
        inner = predictor_width or width
        self.predictor = TokenPredictor(
            width,
            grid_of(run.image_size, run.patch),
            inner=inner,
            depth=predictor_depth,
            heads=predictor_heads or max(inner // 64, 1),
            out=inner,
            cross=True,
        )
        count = at_most(clusters, run.images, each=16)
        self.head = Prototypes(inner, count)
        # The clusters, which are trained on the momentum encoder's patches
        self.clustering = nn.Linear(width, count)
        nn.init.normal_(self.clustering.weight)
        nn.init.zeros_(self.clustering.bias)
        self.criterion = CAPILoss(
            teacher_temperature, temperature, iterations, gather_distributed=run.group is not None
        )
        self.predicted = predicted

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        mask = batch.masks[0]
        assert mask.visible is not None  # as `views` drops patches
        tokens = student.encode(batch.views, batch.masks).tokens
        assert tokens is not None  # an encoder without patches has refused the masks
        with torch.no_grad():
            whole = teacher.encode(batch.views, tokens=True).tokens
            assert whole is not None
            whole = normalize(whole, dim=2)
        clustering, codes, scores = self._clustering(student.clustering, whole)
        wanted = self._wanted(mask.hidden, batch.index, step)  # [B, Q]
        predicted = student.predictor(tokens, mask.visible, wanted, mask.hidden.shape[1:])
        student.note(projection=predicted.detach()[:, 0])
        features = normalize(predicted, dim=2)
        prototypes = student.head.unit_weight(step)
        rows = wanted.numel()
        if scores_fit(rows, rows, len(prototypes), features.element_size()):
            prediction = self.criterion.cross_entropy(linear(features, prototypes), scores, codes, wanted)
        else:
            sides = features, prototypes, with_ones(whole), with_bias(student.clustering)
            prediction = self.criterion.head_cross_entropy(*sides, codes, wanted)
        return {"prediction": prediction, "clustering": clustering}

    def _clustering(self, clusters: nn.Linear, whole: Tensor) -> tuple[Tensor, PlaceCodes, Tensor]:
        """The loss that trains the clusters on patches [B, L, D], their codes, and the scores [B, L, K], constants."""
        rows = whole.shape[0] * whole.shape[1]
        held = scores_fit(rows, rows, clusters.out_features, whole.element_size())
        with torch.set_grad_enabled(held and torch.is_grad_enabled()):
            scores = clusters(whole)
        codes = self.criterion.codes(scores)
        if held:
            return self.criterion.cross_entropy(scores, scores, codes), codes, scores.detach()
        features = with_ones(whole)
        prototypes = with_bias(clusters)
        return self.criterion.head_cross_entropy(features, prototypes, features, prototypes, codes), codes, scores

    def _wanted(self, hidden: Tensor, index: Tensor, step: Tensor) -> Tensor:
        """[B, Q] int64: some of the hidden patches [B, h, w], at random: the same for an image on whatever rank."""
        _, height, width = hidden.shape
        count = hidden_patches((height, width), self.views.mask)
        places = hidden_indices(hidden, count)
        number = max(int(count * self.predicted), 1)
        chosen = drawn_in_a_step(index, step, count, self.run.seed).argsort(1)[:, :number]
        return places.gather(1, chosen)


def with_ones(x: Tensor) -> Tensor:
    """[B, L, D] -> [B, L, D + 1]."""
    return torch.cat([x, torch.ones_like(x[..., :1])], 2)


def with_bias(layer: nn.Linear) -> Tensor:
    """[K, D + 1]: what gives `layer(x)` of `with_ones(x)`."""
    return torch.cat([layer.weight, layer.bias[:, None]], 1)
