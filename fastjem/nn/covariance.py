"""Losses on covariance as modules, with lightly's names, arguments and defaults."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, check_distributed, default_group
from fastjem.functional import checks
from fastjem.nn.hooks import Hooks
from fastjem.nn.parts import HeldMean
from fastjem.nn.tokens import matches


class _TracksHealth(nn.Module):
    """Both switches may be turned at any time, for example on the steps that are logged."""

    def __init__(self, track_health: bool, track_spectrum: bool):
        super().__init__()
        self.track_health = track_health
        self.track_spectrum = track_spectrum
        self.health: F.Health | None = None

    def _new_health(self) -> F.Health | None:
        if self.track_health or self.track_spectrum:
            self.health = F.Health(keep_spectrum=self.track_spectrum)
            return self.health
        return None


class BarlowTwinsLoss(_TracksHealth):
    """`fastjem.functional.barlow_twins` of two views [N, D].

    Args:
        lambda_param: weight of the off-diagonal.
        gather_distributed: take the statistics over the global batch of all ranks (lightly normalises each rank's
            own batch and averages the correlations).
        track_health: keep `health`, the figures of the last call: every dimension's std, the effective rank.
        track_spectrum: so that `health.spectrum()` can be asked, too.
    """

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        track_health: bool = False,
        track_spectrum: bool = False,
    ):
        super().__init__(track_health, track_spectrum)
        check_distributed("BarlowTwinsLoss", gather_distributed)
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group = default_group(self.gather_distributed)
        return F.barlow_twins(z_a, z_b, lambda_param=self.lambda_param, group=group, health=self._new_health())


class VICRegLoss(_TracksHealth):
    """`fastjem.functional.vicreg` of two views [N, ..., D]; with dimensions between, statistics are of each position.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        gather_distributed: take the loss over the global batch of all ranks.
        eps: added to the variance.
        variance_factor: 0.5 as in the official code and lightly, 1 as in the paper.
        track_health: keep `health`, the figures of the last call on [N, D] views: every dimension's std, the effective
            rank.
        track_spectrum: so that `health.spectrum()` can be asked, too.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
        variance_factor: float = 0.5,
        track_health: bool = False,
        track_spectrum: bool = False,
    ):
        super().__init__(track_health, track_spectrum)
        check_distributed("VICRegLoss", gather_distributed)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps
        self.variance_factor = variance_factor

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        options = {
            "lambda_param": self.lambda_param,
            "mu_param": self.mu_param,
            "nu_param": self.nu_param,
            "eps": self.eps,
            "variance_factor": self.variance_factor,
            "group": default_group(self.gather_distributed),
        }
        if getattr(z_a, "ndim", 2) <= 2:
            return F.vicreg(z_a, z_b, **options, health=self._new_health())
        with Agreement("VICRegLoss", options["group"]) as ranks:
            if z_a.shape != z_b.shape:
                came = f"{tuple(z_a.shape)} and {tuple(z_b.shape)}"
                checks.fail("VICRegLoss", "z_a and z_b must have one shape", came)
            ranks.rows_of(z_a)
        positions = zip(z_a.flatten(1, -2).unbind(1), z_b.flatten(1, -2).unbind(1), strict=True)
        return torch.stack([F.vicreg(a, b, **options) for a, b in positions]).mean()


class VICRegLLoss(Hooks):
    """VICRegL: VICReg of the views' global features and of matched local ones (Bardes et al. 2022, arXiv 2210.01571).

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        alpha: weight of the global loss; 1 - alpha is the local one's.
        gather_distributed: take the statistics over the global batch of all ranks, each of which must have rows.
        eps: added to the variance.
        num_matches: how many nearest neighbours count from a to b, and from b to a.

    Local variance and covariance are over the images, of each match by itself: `in_their_order` says which matches of
    two images are the same one. False: the nearest ones, the second nearest ones and so on, as in lightly. True, in a
    subclass: the chosen places in the map's order, as in main_vicregl.py, which `fastjem.methods.VICRegL` follows.
    """

    in_their_order: ClassVar[bool] = False
    never_called: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "_global_loss",
            "_global_invariance_loss",
            "_global_variance_and_covariance_loss",
            "_local_loss",
            "_local_l2_loss",
            "_local_location_loss",
            "_nearest_neighbors_on_l2",
            "_nearest_neighbors_on_grid",
        ),
        "assign another vicreg_loss, or override forward",
    )

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        alpha: float = 0.75,
        gather_distributed: bool = False,
        eps: float = 0.0001,
        num_matches: tuple[int, int] = (20, 4),
    ):
        super().__init__()
        check_distributed("VICRegLLoss", gather_distributed)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.alpha = alpha
        self.gather_distributed = gather_distributed
        self.eps = eps
        self.num_matches = num_matches
        self.vicreg_loss = VICRegLoss(lambda_param, mu_param, 0.5 * nu_param, gather_distributed, eps)

    def forward(
        self,
        global_view_features: Sequence[tuple[Tensor, Tensor]],
        global_view_grids: Sequence[Tensor],
        local_view_features: Sequence[tuple[Tensor, Tensor]] | None = None,
        local_view_grids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """0-dim. Features are pairs ([N, D], [N, H, W, D_local]) per view, grids [N, H, W, 2]."""
        with Agreement("VICRegLLoss", default_group(self.gather_distributed)) as ranks:
            features, grids, pairs = self._checked(
                global_view_features, global_view_grids, local_view_features, local_view_grids
            )
            tensors = [x for view in features for x in view] + grids
            ranks.alike(len(global_view_features), *((list(x.shape[1:]), x.dtype) for x in tensors))
        return self.alpha * self._global(features, pairs) + (1 - self.alpha) * self._local(features, grids, pairs)

    def _checked(
        self,
        global_view_features: Sequence[tuple[Tensor, Tensor]],
        global_view_grids: Sequence[Tensor],
        local_view_features: Sequence[tuple[Tensor, Tensor]] | None,
        local_view_grids: Sequence[Tensor] | None,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], list[tuple[int, int]]]:
        """Features and grids of all views, and which views are compared."""
        if len(global_view_features) != len(global_view_grids):
            came = f"{len(global_view_features)} and {len(global_view_grids)}"
            checks.fail("VICRegLLoss", "global_view_features and global_view_grids must be as many", came)
        if (local_view_features is None) != (local_view_grids is None):
            checks.fail(
                "VICRegLLoss", "local_view_features and local_view_grids must both be given or none", "one of them"
            )
        local_features = list(local_view_features or ())
        local_grids = list(local_view_grids or ())
        if len(local_features) != len(local_grids):
            came = f"{len(local_features)} and {len(local_grids)}"
            checks.fail("VICRegLLoss", "local_view_features and local_view_grids must be as many", came)
        features = [*global_view_features, *local_features]
        grids = [*global_view_grids, *local_grids]
        pairs = [(i, j) for i in range(len(global_view_features)) for j in range(len(features)) if i != j]
        if not pairs:
            checks.fail("VICRegLLoss", "there must be at least two views, one of them global", f"{len(features)}")
        checks.matrices("VICRegLLoss", "global features must be [N, D] of each view", *(x for x, _ in features))
        for (_, local), grid in zip(features, grids, strict=True):
            contract = "local features must be [N, H, W, D_local] and grids [N, H, W, 2]"
            checks.matrices("VICRegLLoss", contract, local, dims=4)
            if grid.shape != (*local.shape[:3], 2) or local.shape[0] != features[0][0].shape[0]:
                checks.fail("VICRegLLoss", contract, f"{tuple(local.shape)} and {tuple(grid.shape)}")
        return features, grids, pairs

    def _global(self, features: Sequence[tuple[Tensor, Tensor]], pairs: list[tuple[int, int]]) -> Tensor:
        invariance = torch.stack([nn.functional.mse_loss(features[i][0], features[j][0]) for i, j in pairs]).mean()
        group = default_group(self.gather_distributed)
        # vicreg of a view with itself: v / 2 and c are counted twice
        nu = checks.number("VICRegLLoss", "nu_param", self.nu_param, features[0][0]) / 2
        statistics = [
            F.vicreg(z, z, lambda_param=0.0, mu_param=self.mu_param, nu_param=nu, eps=self.eps, group=group)
            for z, _ in features
        ]
        return self.lambda_param * invariance + torch.stack(statistics).mean()

    def _local(
        self, features: Sequence[tuple[Tensor, Tensor]], grids: Sequence[Tensor], pairs: list[tuple[int, int]]
    ) -> Tensor:
        losses = []
        for i, j in pairs:
            a, b = (features[k][1].flatten(1, 2) for k in (i, j))  # [N, H W, D]
            grid_a, grid_b = (grids[k].flatten(1, 2) for k in (i, j))
            for distances in (torch.cdist(a.detach(), b.detach()), torch.cdist(grid_a, grid_b)):
                to_b = matches(a, b, distances, self.num_matches[0], in_their_order=self.in_their_order)
                to_a = matches(b, a, distances.mT, self.num_matches[1], in_their_order=self.in_their_order)
                losses.append(0.5 * (self.vicreg_loss(*to_b) + self.vicreg_loss(*to_a)))
        return torch.stack(losses).sum() / len(pairs)


class TiCoLoss(nn.Module):
    """`fastjem.functional.tico` of two views [N, D].

    The covariance `C` [D, D] is a buffer: it moves with the module and is checkpointed. None before the first step.

    Args:
        beta: how much of the covariance stays at each step.
        rho: weight of the covariance.
        gather_distributed: take the global batch of all ranks.
        defer_covariance_update: forward leaves `C`, and `step_ends`, which you call once per optimiser step, moves it
            by all batches since the last call: with gradient accumulation as with one large batch.

    A batch must have two rows at least, of all ranks together, as lightly's; a micro-batch of several may have one.
    """

    C: Tensor | None

    def __init__(
        self,
        beta: float = 0.9,
        rho: float = 8.0,
        gather_distributed: bool = False,
        defer_covariance_update: bool = False,
    ):
        super().__init__()
        check_distributed("TiCoLoss", gather_distributed)
        self.beta = beta
        self.rho = rho
        self.gather_distributed = gather_distributed
        self.defer_covariance_update = defer_covariance_update
        self.register_buffer("C", None)
        self.held: HeldMean | None = None  # made by the first batch, which tells the width

    def forward(self, z_a: Tensor, z_b: Tensor, update_covariance_matrix: bool = True) -> Tensor:
        group = default_group(self.gather_distributed)
        with Agreement("TiCoLoss", group) as ranks:
            checks.matrices("TiCoLoss", "z_a and z_b must be [N, D] both", z_a, z_b, may_be_empty=0)
            ranks.rows_of(z_a)
            ranks.alike("moves C" if update_covariance_matrix else "leaves C")  # `step_ends` waits for all who do
        knows_sizes = not torch.compiler.is_compiling()
        if knows_sizes and sum(ranks.sizes) < 2 and not self.defer_covariance_update:
            checks.fail("TiCoLoss", "z_a and z_b must have N >= 2 rows, for a covariance", f"N = {sum(ranks.sizes)}")
        loss, covariance = F.tico(z_a, z_b, self.C, beta=self.beta, rho=self.rho, group=group)
        if update_covariance_matrix and self.defer_covariance_update:
            if self.held is None:
                self.held = HeldMean(covariance.shape).to(covariance)
            self.held.hold(covariance, z_a.shape[0])
        elif update_covariance_matrix:
            self.C = covariance
        return loss

    def step_ends(self) -> None:
        """With `defer_covariance_update`: move `C`, once for all batches since the last call."""
        if self.held is None:
            return
        if self.C is None:
            self.C = torch.zeros_like(self.held.total)
        # Each batch held its `beta C + (1 - beta) a^T a / N`: their mean is the new C; nothing else of the old stays.
        self.held.move(self.C, 0.0, default_group(self.gather_distributed))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if (saved := state_dict.get(f"{prefix}C")) is not None and self.C is None:
            self.C = torch.empty_like(saved)  # before the first step its width isn't known
        super()._load_from_state_dict(state_dict, prefix, *args)
