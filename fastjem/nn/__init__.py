"""Modules: losses and heads under the names, with the arguments and the defaults that lightly's users know."""

from fastjem.nn.capi import CAPILoss
from fastjem.nn.clustering import SMoGPrototypes
from fastjem.nn.contrastive import DCLLoss, DCLWLoss, NTXentLoss, SupConLoss
from fastjem.nn.covariance import BarlowTwinsLoss, TiCoLoss, VICRegLLoss, VICRegLoss
from fastjem.nn.distillation import DINOLoss, IBOTPatchLoss
from fastjem.nn.gaussian import LeJEPALoss, SIGReg
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
from fastjem.nn.parts import Center
from fastjem.nn.predictive import GramLoss, NegativeCosineSimilarity
from fastjem.nn.prototypes import DINOProjectionHead, KoLeoLoss, SwaVLoss, SwaVPrototypes, sinkhorn
from fastjem.nn.spectral import EMPSSLLoss, FroSSLLoss, MMCRLoss, SimDINOLoss, Whitening2d, WMSELoss
from fastjem.nn.visreg import VISRegLoss, VISRegLossComponents

__all__ = [
    "BYOLPredictionHead",
    "BYOLProjectionHead",
    "BarlowTwinsLoss",
    "BarlowTwinsProjectionHead",
    "CAPILoss",
    "Center",
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "DINOProjectionHead",
    "DenseCLProjectionHead",
    "EMPSSLLoss",
    "FroSSLLoss",
    "GramLoss",
    "IBOTPatchLoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "LeJEPAProjectionHead",
    "LeWMProjectionHead",
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
    "deactivate_requires_grad",
    "random_block_mask",
    "random_block_mask_image",
    "random_grid_token_mask",
    "random_inverse_block_mask",
    "random_prefix_mask",
    "random_token_mask",
    "sinkhorn",
    "update_momentum",
]
