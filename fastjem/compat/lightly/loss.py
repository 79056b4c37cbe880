"""`lightly.loss`: all of its losses are `fastjem.nn`'s."""

from typing import Any

from fastjem.compat.lightly.lookup import absent, files_of
from fastjem.nn import (
    BarlowTwinsLoss,
    CAPILoss,
    CO2Regularizer,
    DCLLoss,
    DCLWLoss,
    DetConBLoss,
    DetConSLoss,
    DINOLoss,
    DirectCLRLoss,
    DSERegularizer,
    EMPSSLLoss,
    FroSSLLoss,
    HypersphereLoss,
    IBOTPatchLoss,
    IBOTPlusPlusPatchLoss,
    KoLeoLoss,
    LeJEPALoss,
    LeWMLoss,
    MACLLoss,
    MemoryBankModule,
    MMCRLoss,
    MSNLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    PatchKernelAlignmentLoss,
    PMSNCustomLoss,
    PMSNLoss,
    SIGReg,
    SwaVLoss,
    SymNegCosineSimilarityLoss,
    TiCoLoss,
    VICRegLLoss,
    VICRegLoss,
    VISRegLoss,
    VISRegLossComponents,
    Whitening2d,
    WMSELoss,
    roi_resample_to_grid,
    sinkhorn,
)
from fastjem.nn.contrastive import negative_mises_fisher_weights

__all__ = [
    "BarlowTwinsLoss", "CAPILoss", "CO2Regularizer", "DCLLoss", "DCLWLoss", "DINOLoss", "DSERegularizer", "DetConBLoss",
    "DetConSLoss", "DirectCLRLoss", "EMPSSLLoss", "FroSSLLoss", "HypersphereLoss", "IBOTPatchLoss",
    "IBOTPlusPlusPatchLoss", "KoLeoLoss", "LeJEPALoss", "LeWMLoss", "MACLLoss", "MMCRLoss", "MSNLoss",
    "MemoryBankModule", "NTXentLoss", "NegativeCosineSimilarity", "PMSNCustomLoss", "PMSNLoss",
    "PatchKernelAlignmentLoss", "SIGReg", "SwaVLoss", "SymNegCosineSimilarityLoss", "TiCoLoss", "VICRegLLoss",
    "VICRegLoss", "VISRegLoss", "VISRegLossComponents", "WMSELoss", "Whitening2d", "negative_mises_fisher_weights",
    "roi_resample_to_grid", "sinkhorn",
]  # fmt: skip

globals().update(files_of("loss"))


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
