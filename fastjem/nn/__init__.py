"""Modules: losses and heads under the names, with the arguments and the defaults that lightly's users know."""

import fastjem.functional
from fastjem.nn.aligned import DetConBLoss, DetConSLoss, DirectCLRLoss, HypersphereLoss, MACLLoss
from fastjem.nn.capi import CAPILoss
from fastjem.nn.captions import CoCaLoss, DistillClipLoss
from fastjem.nn.clustering import SMoGPrototypes
from fastjem.nn.contrastive import DCLLoss, DCLWLoss, NTXentLoss, SupConLoss
from fastjem.nn.covariance import BarlowTwinsLoss, TiCoLoss, VICRegLLoss, VICRegLoss
from fastjem.nn.dense import PatchKernelAlignmentLoss, roi_resample_to_grid
from fastjem.nn.distillation import DINOLoss, IBOTPatchLoss, IBOTPlusPlusPatchLoss
from fastjem.nn.gaussian import LeJEPALoss, LeWMLoss, SIGReg
from fastjem.nn.heads import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    DenseCLProjectionHead,
    LeJEPAProjectionHead,
    LeWMProjectionHead,
    MMCRProjectionHead,
    MoCoProjectionHead,
    MSNProjectionHead,
    NNCLRPredictionHead,
    NNCLRProjectionHead,
    ProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SMoGPredictionHead,
    SMoGProjectionHead,
    SwaVProjectionHead,
    TiCoProjectionHead,
    VicRegLLocalProjectionHead,
    VICRegProjectionHead,
)
from fastjem.nn.image_text import ClipLoss, SigLipLoss
from fastjem.nn.masks import (
    random_block_mask,
    random_block_mask_image,
    random_grid_token_mask,
    random_inverse_block_mask,
    random_prefix_mask,
    random_token_mask,
)
from fastjem.nn.memory_bank import MemoryBankModule, NNCLRLoss, NNMemoryBankModule
from fastjem.nn.momentum import activate_requires_grad, deactivate_requires_grad, update_momentum
from fastjem.nn.msn import MSNLoss, PMSNCustomLoss, PMSNLoss
from fastjem.nn.named import name_errors
from fastjem.nn.parts import Center
from fastjem.nn.predictive import GramLoss, NegativeCosineSimilarity, SymNegCosineSimilarityLoss
from fastjem.nn.prototypes import (
    CAPIProjectionHead,
    DINOProjectionHead,
    DINOv2ProjectionHead,
    KoLeoLoss,
    SwaVLoss,
    SwaVPrototypes,
    sinkhorn,
)
from fastjem.nn.regularizers import CO2Regularizer, DSERegularizer
from fastjem.nn.shuffling import batch_shuffle, batch_unshuffle
from fastjem.nn.spectral import EMPSSLLoss, FroSSLLoss, MMCRLoss, SimDINOLoss, Whitening2d, WMSELoss
from fastjem.nn.visreg import VISRegLoss, VISRegLossComponents

__all__ = [
    "BYOLPredictionHead",
    "BYOLProjectionHead",
    "BarlowTwinsLoss",
    "BarlowTwinsProjectionHead",
    "CAPILoss",
    "CAPIProjectionHead",
    "CO2Regularizer",
    "Center",
    "ClipLoss",
    "CoCaLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "DINOProjectionHead",
    "DINOv2ProjectionHead",
    "DSERegularizer",
    "DenseCLProjectionHead",
    "DetConBLoss",
    "DetConSLoss",
    "DirectCLRLoss",
    "DistillClipLoss",
    "EMPSSLLoss",
    "FroSSLLoss",
    "GramLoss",
    "HypersphereLoss",
    "IBOTPatchLoss",
    "IBOTPlusPlusPatchLoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "LeJEPAProjectionHead",
    "LeWMLoss",
    "LeWMProjectionHead",
    "MACLLoss",
    "MMCRLoss",
    "MMCRProjectionHead",
    "MSNLoss",
    "MSNProjectionHead",
    "MemoryBankModule",
    "MoCoProjectionHead",
    "NNCLRLoss",
    "NNCLRPredictionHead",
    "NNCLRProjectionHead",
    "NNMemoryBankModule",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "PMSNCustomLoss",
    "PMSNLoss",
    "PatchKernelAlignmentLoss",
    "ProjectionHead",
    "SIGReg",
    "SMoGPredictionHead",
    "SMoGProjectionHead",
    "SMoGPrototypes",
    "SigLipLoss",
    "SimCLRProjectionHead",
    "SimDINOLoss",
    "SimSiamPredictionHead",
    "SimSiamProjectionHead",
    "SupConLoss",
    "SwaVLoss",
    "SwaVProjectionHead",
    "SwaVPrototypes",
    "SymNegCosineSimilarityLoss",
    "TiCoLoss",
    "TiCoProjectionHead",
    "VICRegLLoss",
    "VICRegLoss",
    "VICRegProjectionHead",
    "VISRegLoss",
    "VISRegLossComponents",
    "VicRegLLocalProjectionHead",
    "WMSELoss",
    "Whitening2d",
    "activate_requires_grad",
    "batch_shuffle",
    "batch_unshuffle",
    "deactivate_requires_grad",
    "random_block_mask",
    "random_block_mask_image",
    "random_grid_token_mask",
    "random_inverse_block_mask",
    "random_prefix_mask",
    "random_token_mask",
    "roi_resample_to_grid",
    "sinkhorn",
    "update_momentum",
]

# Whatever a module is made of, its errors name the module.
name_errors(
    [value for value in map(globals().__getitem__, __all__) if isinstance(value, type)],
    [*fastjem.functional.__all__, "unit_keys", "push_rows", "move_center", "HeldRows", "HeldMean", "MLP", "health"],
)
