"""SIGReg, LeJEPA and LeWorldModel as modules, with lightly's names, arguments and defaults."""

from typing import ClassVar

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import check_distributed, default_group
from fastjem.functional import checks
from fastjem.nn.hooks import Hooks


class SIGReg(Hooks):
    """`fastjem.functional.sigreg` of [..., N, D] with fresh random directions at each call.

    Args:
        knots: how many frequencies in [0, t_max].
        t_max: the largest frequency.
        num_vectors: how many directions.
        gather_distributed: take the means over the global batch of all ranks, which draw the same directions.
    """

    t: Tensor
    phi: Tensor
    weights: Tensor
    never_called: ClassVar[dict[str, str]] = {
        "_generate_unit_vectors": "override directions",
        "_project_embeddings_to_unit_vector": "override forward",
        "_compute_cf_error_at_each_frequency": "override forward",
        "_integrate_via_trapezoidal_rule": "override forward",
    }

    def __init__(
        self, *, knots: int = 17, t_max: float = 3.0, num_vectors: int = 1024, gather_distributed: bool = False
    ):
        super().__init__()
        check_distributed("SIGReg", gather_distributed)
        knots = checks.integer("SIGReg", "knots", knots, 2)
        num_vectors = checks.integer("SIGReg", "num_vectors", num_vectors, 1)
        t_max = checks.host_number("SIGReg", "t_max", t_max, low=0)
        self.knots = knots
        self.t_max = t_max
        self.num_vectors = num_vectors
        self.gather_distributed = gather_distributed
        # These are here for lightly's checkpoints: the loss computes them as it goes.
        for name in ("t", "phi", "weights"):
            self.register_buffer(name, torch.empty(knots))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.t.copy_(torch.linspace(0, self.t_max, self.knots))
        self.phi.copy_(torch.exp(-self.t.square() / 2))
        self.weights.copy_(self.phi * (2 * self.t_max / (self.knots - 1)))
        self.weights[[0, -1]] /= 2

    def directions(self, proj: Tensor) -> Tensor:
        """[D, num_vectors] fresh random unit columns for embeddings [..., D], on every rank the same."""
        return F.random_directions(proj.shape[-1], self.num_vectors, proj, group=default_group(self.gather_distributed))

    def forward(self, proj: Tensor) -> Tensor:
        proj = proj.flatten(0, -3) if proj.dim() > 3 else proj
        group = default_group(self.gather_distributed)
        return F.sigreg(proj, self.directions(proj), knots=self.knots, t_max=self.t_max, group=group)


class LeJEPALoss(nn.Module):
    """`fastjem.functional.lejepa`: `lambda SIGReg(all views) + (1 - lambda) invariance`.

    Args:
        lambda_param: weight of SIGReg in [0, 1].
        gather_distributed: take the loss over the global batch of all ranks.
        sigreg_knots, sigreg_t_max, sigreg_num_vectors: see `SIGReg`.
    """

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
    ):
        super().__init__()
        self.lambda_param = checks.number("LeJEPALoss", "lambda_param", lambda_param, low=0, high=1, inclusive=True)
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
        )

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        """0-dim, of [V_local, N, D] and [V_global, N, D]."""
        return F.lejepa(
            local_proj,
            global_proj,
            self.sigreg.directions(global_proj),
            lambda_param=self.lambda_param,
            knots=self.sigreg.knots,
            t_max=self.sigreg.t_max,
            group=default_group(self.sigreg.gather_distributed),
        )


class LeWMLoss(nn.Module):
    """`mse(predicted, target) + lambda SIGReg(embeddings)`: LeWorldModel's loss (2026, arXiv 2603.19312).

    Args:
        lambda_param: weight of SIGReg, at least 0; it is beside the squared error, not between the two as LeJEPA's.
        normalize: predictions and targets are taken behind a layer norm without affine part.
        gather_distributed: SIGReg is of the global batch of all ranks.
        sigreg_knots, sigreg_t_max, sigreg_num_vectors: see `SIGReg`.
    """

    def __init__(
        self,
        lambda_param: float = 0.1,
        normalize: bool = False,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
    ):
        super().__init__()
        self.lambda_param = checks.number("LeWMLoss", "lambda_param", lambda_param, low=0, inclusive=True)
        self.normalize = normalize
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
        )

    def forward(self, *, predicted: Tensor, target: Tensor, embeddings: Tensor) -> Tensor:
        """0-dim.

        Args:
            predicted, target: [B, ..., D], of later latents; the target's get no gradient.
            embeddings: [B, T, D], the encoder's, with their gradient. SIGReg is of each step's B by themselves.
        """
        is_sequence = embeddings.dim() == 3
        if not is_sequence or (embeddings.shape[0], embeddings.shape[2]) != (predicted.shape[0], predicted.shape[-1]):
            contract = "embeddings must be [B, T, D] of as many images and as wide as predicted"
            checks.fail("LeWMLoss", contract, f"{tuple(embeddings.shape)} and {tuple(predicted.shape)}")
        if predicted.shape != target.shape:
            contract = "predicted and target must be of one shape"
            checks.fail("LeWMLoss", contract, f"{tuple(predicted.shape)} and {tuple(target.shape)}")
        if self.normalize:
            predicted = nn.functional.layer_norm(predicted, predicted.shape[-1:])
        prediction = F.regression(predicted, target, beta=0, normalize=self.normalize)
        return prediction + self.lambda_param * self.sigreg(embeddings.transpose(0, 1))
