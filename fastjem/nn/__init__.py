"""Modules with the names, arguments and defaults that users of lightly and open_clip know."""

from fastjem.nn.contrastive import ClipLoss, DCLLoss, DCLWLoss, NTXentLoss, SigLipLoss, SupConLoss
from fastjem.nn.memory_bank import MemoryBankModule, NNMemoryBankModule

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "MemoryBankModule",
    "NNMemoryBankModule",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
]
