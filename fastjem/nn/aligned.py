"""Contrastive losses that look at how near positives are; DirectCLR; DetCon. Names and arguments are lightly's."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import check_distributed, default_group
from fastjem.functional import checks
from fastjem.nn.contrastive import NTXentLoss


class DirectCLRLoss(NTXentLoss):
    """`NTXentLoss` of the first channels of representations, without a projector (Jing et al. 2021, arXiv 2110.09348).

    Args:
        loss_dim: how many channels; of fewer all are taken.
        temperature, memory_bank_size, gather_distributed, options: see `NTXentLoss`. A memory bank is as wide as
            `loss_dim`.
    """

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        **options: Any,
    ):
        super().__init__(temperature, memory_bank_size, gather_distributed, **options)
        self.loss_dim = checks.integer("DirectCLRLoss", "loss_dim", loss_dim, 1)

    def forward(self, out0: Tensor, out1: Tensor, **options: Any) -> Tensor:
        """[N, ...] and [N, ...], flattened to [N, D] -> 0-dim; options as of `NTXentLoss`."""
        for x in (out0, out1):
            if not isinstance(x, Tensor) or x.dim() < 2:
                checks.fail("DirectCLRLoss", "out0 and out1 must be [N, ...] both", checks.shape(x))
        return super().forward(*(x.flatten(1)[:, : self.loss_dim] for x in (out0, out1)), **options)


class MACLLoss(nn.Module):
    """`fastjem.functional.macl`: NT-Xent whose temperature follows the alignment of positives.

    Args:
        temperature, alpha: see there.
        A_0: its `initial_alignment`.
    """

    def __init__(self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0):
        super().__init__()
        # The names of the errors are those of the arguments here.
        self.temperature = checks.host_number("MACLLoss", "temperature", temperature, low=0)
        self.alpha = checks.host_number("MACLLoss", "alpha", alpha, low=0, high=1, inclusive=True)
        self.A_0 = checks.host_number("MACLLoss", "A_0", A_0, low=0, high=1, inclusive=True)
        self.eps = 1e-8

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """[N, D] and [N, D] -> 0-dim."""
        return F.macl(
            z0, z1, temperature=self.temperature, alpha=self.alpha, initial_alignment=self.A_0, eps=self.eps
        )  # fmt: skip


class HypersphereLoss(nn.Module):
    """`fastjem.functional.hypersphere`: alignment and uniformity.

    Args:
        t, lam, alpha: see there.
    """

    def __init__(self, t: float = 1.0, lam: float = 1.0, alpha: float = 2.0):
        super().__init__()
        self.t = t
        self.lam = lam
        self.alpha = alpha

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """[N, D] and [N, D] -> 0-dim."""
        return F.hypersphere(z_a, z_b, t=self.t, lam=self.lam, alpha=self.alpha)


class DetConBLoss(nn.Module):
    """`fastjem.functional.detcon` of a predictor's and a target network's regions.

    Args:
        temperature: what cosines are divided by.
        gather_distributed: the regions of all ranks are candidates; on by default, as in lightly.
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True):
        super().__init__()
        check_distributed("DetConBLoss", gather_distributed)
        self.temperature = checks.positive("DetConBLoss", "temperature", temperature)
        self.gather_distributed = gather_distributed

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        """0-dim, of four [B, M, D] and two [B, M] of integers: what each of the M regions of an image shows."""
        features = (pred_view0, pred_view1, target_view0, target_view1)
        options: dict[str, Any] = {
            "temperature": self.temperature, "group": default_group(self.gather_distributed)
        }  # fmt: skip
        return F.detcon(*features, mask_view0, mask_view1, **options)


class DetConSLoss(nn.Module):
    """`fastjem.functional.detcon` of one network's regions, which are targets, too. Arguments as of `DetConBLoss`."""

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True):
        super().__init__()
        self.detconbloss = DetConBLoss(temperature, gather_distributed)

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        """0-dim, of two [B, M, D] and two [B, M] of integers: what each of the M regions of an image shows."""
        return self.detconbloss(view0, view1, view0, view1, mask_view0, mask_view1)
