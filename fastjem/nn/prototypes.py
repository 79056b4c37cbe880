"""SwAV's and MSN's losses, and the heads that give prototype scores. Names, arguments and defaults are lightly's."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastjem.functional as F
from fastjem.collectives import check_distributed, default_group
from fastjem.functional import checks
from fastjem.functional.precision import loss_dtype, without_autocast
from fastjem.nn.parts import MLP, init_as_vision_transformer


def sinkhorn(out: Tensor, iterations: int = 3, epsilon: float = 0.05, gather_distributed: bool = False) -> Tensor:
    """`fastjem.functional.sinkhorn` of prototype scores [B, K], over all ranks if `gather_distributed`."""
    return F.sinkhorn(out, epsilon=epsilon, iterations=iterations, group=default_group(gather_distributed))


class SwaVLoss(nn.Module):
    """Swapped assignments between views (Caron et al. 2020, arXiv 2006.09882), from prototype scores.

    Args:
        temperature: of the predictions.
        sinkhorn_iterations, sinkhorn_epsilon: of the codes.
        sinkhorn_gather_distributed: codes, and the mean of the loss, over the samples of all ranks.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_distributed("SwaVLoss", sinkhorn_gather_distributed, "sinkhorn_gather_distributed")
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed

    def forward(
        self,
        high_resolution_outputs: list[Tensor],
        low_resolution_outputs: list[Tensor],
        queue_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """0-dim.

        Args:
            high_resolution_outputs, low_resolution_outputs: scores [B, K] of each crop.
            queue_outputs: one [Q, K] per high-resolution crop, which counts in the crop's Sinkhorn alone.
        """
        high = list(high_resolution_outputs)
        low = list(low_resolution_outputs)
        if queue_outputs is not None and len(queue_outputs) != len(high):
            raise ValueError(
                "SwaVLoss: queue_outputs must be one for each high-resolution crop, "
                f"got {len(queue_outputs)} for {len(high)}"
            )
        group = default_group(self.sinkhorn_gather_distributed)
        bias = [
            F.sinkhorn_bias(
                crop if queue_outputs is None else [crop, queue_outputs[i]],
                epsilon=self.sinkhorn_epsilon,
                iterations=self.sinkhorn_iterations,
                group=group,
            )
            for i, crop in enumerate(high)
        ]
        return F.prototype_cross_entropy(
            [*high, *low],
            high,
            student_temperature=self.temperature,
            teacher_temperature=self.sinkhorn_epsilon,
            teacher_bias=torch.stack(bias),
            group=group,
        )


class MSNLoss(nn.Module):
    """Masked Siamese Networks (Assran et al. 2022, arXiv 2204.07141).

    Args:
        temperature: of the similarities with the prototypes, in (0, inf).
        sinkhorn_iterations: on the sharpened targets; 0 for none.
        regularization_weight: of the mean entropy regulariser; 0 for none.
        gather_distributed: Sinkhorn, the regulariser and the mean of the loss over the samples of all ranks.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("MSNLoss", "temperature", temperature)
        check_distributed("MSNLoss", gather_distributed)
        self.temperature = temperature
        self.sinkhorn_iterations = checks.integer("MSNLoss", "sinkhorn_iterations", sinkhorn_iterations, 0)
        self.regularization_weight = regularization_weight
        self.gather_distributed = gather_distributed

    def forward(
        self, anchors: Tensor, targets: Tensor, prototypes: Tensor, target_sharpen_temperature: float = 0.25
    ) -> Tensor:
        """0-dim. anchors [V B, D], view after view; targets [B, D], constants; prototypes [K, D]. Normalised inside."""
        if anchors.shape[0] % targets.shape[0]:
            raise ValueError(
                f"MSNLoss: anchors must be whole views of the {len(targets)} targets, got {len(anchors)} rows"
            )
        group = default_group(self.gather_distributed)
        with without_autocast(anchors):
            wide = loss_dtype(anchors)
            anchors, targets, prototypes = (functional.normalize(x.to(wide)) for x in (anchors, targets, prototypes))
            views = (anchors @ prototypes.T).split(len(targets))  # V x [B, K]
            teacher = targets.detach() @ prototypes.detach().T
        temperature = checks.positive("MSNLoss", "temperature", self.temperature, anchors)
        sharp = temperature * checks.positive(
            "MSNLoss", "target_sharpen_temperature", target_sharpen_temperature, anchors
        )
        bias = None
        if self.sinkhorn_iterations:
            bias = F.sinkhorn_bias(
                teacher, epsilon=sharp, iterations=self.sinkhorn_iterations, normalize_samples_first=True, group=group
            )
        loss = F.prototype_cross_entropy(
            views,
            [teacher],
            student_temperature=self.temperature,
            teacher_temperature=sharp,
            teacher_bias=bias,
            pairs="all",
            group=group,
        )
        weight = checks.number("MSNLoss", "regularization_weight", self.regularization_weight, anchors)
        if isinstance(weight, Tensor) or weight > 0:
            loss = loss + weight * F.mean_entropy(views, temperature=self.temperature, group=group)
        return loss


class KoLeoLoss(nn.Module):
    """`fastjem.functional.koleo` of [N, D]: spreads a batch by the distance of each row to its nearest.

    Args:
        p: the norm's degree.
        eps: see `fastjem.functional.koleo`.
    """

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__()
        self.p = p
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.koleo(x, p=self.p, eps=self.eps)


class SwaVPrototypes(nn.Module):
    """Scores of normalised features with one or several sets of prototypes.

    Args:
        input_dim: D.
        n_prototypes: K, or a list of them; with a list, forward returns a list.
        n_steps_frozen_prototypes: so many steps the prototypes are constant.
    """

    def __init__(
        self, input_dim: int = 128, n_prototypes: list[int] | int = 3000, n_steps_frozen_prototypes: int = 0
    ) -> None:
        super().__init__()
        self.n_prototypes = n_prototypes if isinstance(n_prototypes, list) else [n_prototypes]
        self._is_single_prototype = isinstance(n_prototypes, int)
        self.heads = nn.ModuleList([nn.Linear(input_dim, k) for k in self.n_prototypes])
        self.n_steps_frozen_prototypes = n_steps_frozen_prototypes

    def forward(self, x: Tensor, step: int | None = None) -> Tensor | list[Tensor]:
        """[B, D] -> [B, K], or a list of them."""
        if self.n_steps_frozen_prototypes > 0:
            if step is None:
                raise ValueError("SwaVPrototypes: step must be given where n_steps_frozen_prototypes > 0, got None")
            self.requires_grad_(step >= self.n_steps_frozen_prototypes)
        scores = [head(x) for head in self.heads]
        return scores[0] if self._is_single_prototype else scores

    @torch.no_grad()
    def normalize(self) -> None:
        """Prototypes of unit length. A prototype of zeros stays."""
        for head in self.heads:
            weight = head.get_parameter("weight")
            weight.copy_(functional.normalize(weight))


class _WeightNormLinear(nn.Module):
    """`x @ (g v / |v|).T`; parameters are named as torch.nn.utils.weight_norm names them."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(output_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(output_dim, input_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear

    @property
    def weight(self) -> Tensor:
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class DINOProjectionHead(nn.Module):
    """Three linear layers with GELU, L2 normalisation, and weight-normalised prototypes: DINO's head.

    Caron et al. 2021, arXiv 2104.14294.

    Args:
        input_dim, hidden_dim, bottleneck_dim, output_dim: widths; output_dim is K.
        batch_norm: after the first two layers; not with a vision transformer.
        freeze_last_layer: `cancel_last_layer_gradients` cancels them in epochs before this one.
        norm_last_layer: prototypes of length 1 (better stability) instead of a learned length.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
        freeze_last_layer: int = -1,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        norm = "batch" if batch_norm else "none"
        self.layers = MLP(input_dim, hidden_dim, hidden_dim, bottleneck_dim, norm=norm, activation=nn.GELU)
        init_as_vision_transformer(self.layers)
        self.freeze_last_layer = freeze_last_layer
        self.last_layer = _WeightNormLinear(bottleneck_dim, output_dim)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def features(self, x: Tensor) -> Tensor:
        """[B, input_dim] -> [B, bottleneck_dim] of unit length: what `prototype_head_cross_entropy` takes."""
        return functional.normalize(self.layers(x), dim=-1)

    def prototypes(self) -> Tensor:
        """[K, bottleneck_dim], differentiable."""
        return self.last_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.features(x))

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Drop the prototypes' gradients in the first `freeze_last_layer` epochs."""
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None
