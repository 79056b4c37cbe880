"""SwAV's and MSN's losses, and the heads that give prototype scores. Names, arguments and defaults are lightly's."""

import math
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import fastjem.functional as F
from fastjem.collectives import (
    Agreement,
    check_distributed,
    default_group,
    mean_loss_of_ranks,
)
from fastjem.functional import checks
from fastjem.functional.precision import loss_dtype
from fastjem.nn.heads import ProjectionHead
from fastjem.nn.hooks import Hooks, is_overridden
from fastjem.nn.parts import MLP, init_as_vision_transformer


def sinkhorn(out: Tensor, iterations: int = 3, epsilon: float = 0.05, gather_distributed: bool = False) -> Tensor:
    """`fastjem.functional.sinkhorn` of prototype scores [B, K], over all ranks if `gather_distributed`."""
    return F.sinkhorn(out, epsilon=epsilon, iterations=iterations, group=default_group(gather_distributed))


class SwaVLoss(nn.Module):
    """Swapped assignments between views (Caron et al. 2020, arXiv 2006.09882), from prototype scores.

    Args:
        temperature: of the predictions.
        sinkhorn_iterations, sinkhorn_epsilon: of the codes; with 0 iterations see `fastjem.functional.sinkhorn`.
        sinkhorn_gather_distributed: codes, and the mean of the loss, over the samples of all ranks (one may have none).

    A subclass may override `subloss`, the loss of one crop's scores by another's codes, which then exist in memory.
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
        group = default_group(self.sinkhorn_gather_distributed)
        with Agreement("SwaVLoss", group) as ranks:
            if queue_outputs is not None and len(queue_outputs) != len(high):
                contract = "queue_outputs must be one for each high-resolution crop"
                checks.fail("SwaVLoss", contract, f"{len(queue_outputs)} for {len(high)}")
            contract = "outputs must be [B, K] of each crop"
            checks.matrices("SwaVLoss", contract, *high, *low, may_be_empty=None if group is None else 0)
            queues = None if queue_outputs is None else list(queue_outputs)
            if queues:
                contract = f"queue_outputs must be [Q, {high[0].shape[1]}] of each high-resolution crop"
                checks.matrices("SwaVLoss", contract, *queues, same=False, may_be_empty=None if group is None else 0)
                if any(queue.shape[1] != high[0].shape[1] for queue in queues):
                    checks.fail("SwaVLoss", contract, [tuple(queue.shape) for queue in queues])
            ranks.alike(len(high), len(low), queues is None)
        if not self.sinkhorn_iterations or is_overridden(self, "subloss", SwaVLoss):
            return self._of_codes(high, low, queues, group)
        bias = [
            F.sinkhorn_bias(
                crop if queues is None else [crop, queues[i]],
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

    def subloss(self, z: Tensor, q: Tensor) -> Tensor:
        """The cross-entropy of scores z [B, K] by codes q [B, K]. Not overridden, `forward` computes all at once."""
        return -(q * functional.log_softmax(z.to(q.dtype) / self.temperature, dim=1)).sum(1).mean()

    def _of_codes(
        self, high: list[Tensor], low: list[Tensor], queues: list[Tensor] | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        """The loss by `subloss`, of codes in memory: where it is overridden, and without Sinkhorn's iterations."""
        crops = [*high, *low]
        pairs = [(i, v) for i in range(len(high)) for v in range(len(crops)) if v != i]
        if not pairs:
            checks.fail("SwaVLoss", "there must be two crops at least, one of high resolution", f"{len(crops)}")
        options = {"epsilon": self.sinkhorn_epsilon, "iterations": self.sinkhorn_iterations, "group": group}
        codes = []
        for i, crop in enumerate(high):
            scores = crop if queues is None else torch.cat([crop, queues[i].to(crop)])
            codes.append(F.sinkhorn(scores, **options)[: crop.shape[0]])
        with Agreement("SwaVLoss", group) as ranks:  # a subclass's own subloss may raise
            loss = torch.stack([self.subloss(crops[v], codes[i]) for i, v in pairs]).sum(0) / len(pairs)
            ranks.rows_of(high[0])
        return mean_loss_of_ranks(loss, high[0].shape[0], group)


class KoLeoLoss(nn.Module):
    """`fastjem.functional.koleo` of [N, D]: spreads a batch by the distance of each row to its nearest.

    Args:
        p: the norm's degree.
        eps, topk, group_size: see `fastjem.functional.koleo`.
        gather_distributed: the rows of all ranks are one batch.
    """

    def __init__(
        self,
        p: float = 2,
        eps: float = 1e-8,
        topk: int = 1,
        group_size: int | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_distributed("KoLeoLoss", gather_distributed)
        self.p = p
        self.eps = eps
        self.topk = topk
        self.group_size = group_size
        self.gather_distributed = gather_distributed
        self.pairwise_distance: nn.Module = nn.PairwiseDistance(p=p, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        distance = self.pairwise_distance
        usual = type(distance) is nn.PairwiseDistance and (distance.norm, distance.eps) == (self.p, self.eps)
        if usual and self.p >= 1 and self.eps > 0:
            group = default_group(self.gather_distributed)
            return F.koleo(x, p=self.p, eps=self.eps, topk=self.topk, group_size=self.group_size, group=group)
        # Another distance, assigned as to lightly's, or an eps of 0: in plain torch, and of lightly's options.
        if self.topk != 1 or self.group_size is not None or self.gather_distributed:
            raise ValueError(
                "KoLeoLoss: with a pairwise_distance of its own, p below 1 or an eps of 0 it has one neighbour, no "
                f"groups and one rank, got topk={self.topk}, group_size={self.group_size} and "
                f"gather_distributed={self.gather_distributed}"
            )
        x = functional.normalize(x.to(loss_dtype(x)), dim=-1, eps=self.eps)
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
        return -(distance(x, x[nearest]) + self.eps).log().mean()


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
        self._freeze_prototypes_if_required(step)
        scores = [head(x) for head in self.heads]
        return scores[0] if self._is_single_prototype else scores

    def _freeze_prototypes_if_required(self, step: int | None = None) -> None:
        """A subclass may override it, as lightly's."""
        if self.n_steps_frozen_prototypes > 0:
            if step is None:
                raise ValueError("SwaVPrototypes: step must be given where n_steps_frozen_prototypes > 0, got None")
            self.requires_grad_(step >= self.n_steps_frozen_prototypes)

    @torch.no_grad()
    def normalize(self) -> None:
        """Prototypes of unit length. A prototype of zeros stays."""
        for head in self.heads:
            weight = head.get_parameter("weight")
            weight.copy_(functional.normalize(weight))


class WeightNormLinear(nn.Module):
    """`x @ (g v / |v|).T + b`; parameters are named as torch.nn.utils.weight_norm names them."""

    bias: nn.Parameter | None

    def __init__(self, input_dim: int, output_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.register_parameter("bias", nn.Parameter(torch.empty(output_dim)) if bias else None)
        self.weight_g = nn.Parameter(torch.empty(output_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(output_dim, input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear
        if self.bias is not None:
            bound = self.weight_v.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class DINOProjectionHead(Hooks):
    """Three linear layers with GELU, L2 normalisation, and weight-normalised prototypes: DINO's head.

    Caron et al. 2021, arXiv 2104.14294.

    Args:
        input_dim, hidden_dim, bottleneck_dim, output_dim: widths; output_dim is K.
        batch_norm: after the first two layers; not with a vision transformer.
        freeze_last_layer: `cancel_last_layer_gradients` cancels them in epochs before this one.
        norm_last_layer: prototypes of length 1 (better stability) instead of a learned length.
    """

    never_called: ClassVar[dict[str, str]] = {"_init_weights": "initialise layers after super().__init__()"}

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
        self.last_layer = WeightNormLinear(bottleneck_dim, output_dim)
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


class DINOv2ProjectionHead(ProjectionHead):
    """Three linear layers with GELU, L2 normalisation, and weight-normalised prototypes of a learned length: DINOv2's.

    Oquab et al. 2023, arXiv 2304.07193. As `DINOProjectionHead`, whose other options it hasn't got.

    Args:
        input_dim, hidden_dim, bottleneck_dim, output_dim: widths; output_dim is K.
        batch_norm: after the first two layers.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
    ) -> None:
        norm = "batch" if batch_norm else "none"
        super().__init__(MLP(input_dim, hidden_dim, hidden_dim, bottleneck_dim, norm=norm, activation=nn.GELU))
        init_as_vision_transformer(self.layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, output_dim)

    def features(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., bottleneck_dim] of unit length: what `prototype_head_cross_entropy` takes."""
        x = self.layers(x)
        return functional.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def prototypes(self) -> Tensor:
        """[K, bottleneck_dim], differentiable."""
        return self.last_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.features(x))


class CAPIProjectionHead(nn.Module):
    """Scores of normalised features against clusters: CAPI's head, the teacher's and the student's.

    Args:
        input_dim: D.
        num_clusters: K.
        bias: of the linear layer.
        weight_norm: clusters' rows of length 1.
    """

    def __init__(
        self, input_dim: int = 384, num_clusters: int = 16384, bias: bool = False, weight_norm: bool = False
    ) -> None:
        super().__init__()
        self.layer = WeightNormLinear(input_dim, num_clusters, bias) if weight_norm else nn.Linear(
            input_dim, num_clusters, bias
        )  # fmt: skip
        if isinstance(self.layer, WeightNormLinear):
            self.layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., K]"""
        return self.layer(functional.normalize(x, dim=-1))
