"""`lightly.models.modules`: heads, memory banks, and vision transformers with masks.

The transformers are of timm or of torchvision, which are imported when one of them is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastjem.compat.lightly.lookup import absent, files_of
from fastjem.nn import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    CAPIProjectionHead,
    Center,
    DenseCLProjectionHead,
    DINOProjectionHead,
    DINOv2ProjectionHead,
    LeJEPAProjectionHead,
    LeWMProjectionHead,
    MemoryBankModule,
    MMCRProjectionHead,
    MoCoProjectionHead,
    MSNProjectionHead,
    NNCLRPredictionHead,
    NNCLRProjectionHead,
    NNMemoryBankModule,
    ProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SMoGPredictionHead,
    SMoGProjectionHead,
    SMoGPrototypes,
    SwaVProjectionHead,
    SwaVPrototypes,
    TiCoProjectionHead,
    VicRegLLocalProjectionHead,
    VICRegProjectionHead,
)

if TYPE_CHECKING:
    from fastjem.compat.timm_predictors import (
        AIMPredictionHead,
        CAPIPredictorTIMM,
        IJEPAPredictorTIMM,
        MaskedCausalVisionTransformer,
    )
    from fastjem.compat.timm_transformers import (
        MaskedVisionTransformerDecoderTIMM,
        MaskedVisionTransformerTIMM,
        init_weights,
    )
    from fastjem.compat.torchvision_transformers import (
        IJEPABackbone,
        IJEPAEncoder,
        IJEPAPredictor,
        MaskedVisionTransformerTorchvision,
    )

__all__ = [
    "AIMPredictionHead", "BYOLPredictionHead", "BYOLProjectionHead", "BarlowTwinsProjectionHead", "CAPIPredictorTIMM",
    "CAPIProjectionHead", "Center", "DINOProjectionHead", "DINOv2ProjectionHead", "DenseCLProjectionHead",
    "IJEPABackbone", "IJEPAEncoder", "IJEPAPredictor", "IJEPAPredictorTIMM", "LeJEPAProjectionHead",
    "LeWMProjectionHead", "MMCRProjectionHead", "MSNProjectionHead", "MaskedCausalVisionTransformer",
    "MaskedVisionTransformerDecoderTIMM", "MaskedVisionTransformerTIMM", "MaskedVisionTransformerTorchvision",
    "MemoryBankModule", "MoCoProjectionHead", "NNCLRPredictionHead", "NNCLRProjectionHead", "NNMemoryBankModule",
    "ProjectionHead", "SMoGPredictionHead", "SMoGProjectionHead", "SMoGPrototypes", "SimCLRProjectionHead",
    "SimSiamPredictionHead", "SimSiamProjectionHead", "SwaVProjectionHead", "SwaVPrototypes", "TiCoProjectionHead",
    "VICRegProjectionHead", "VicRegLLocalProjectionHead", "init_weights",
]  # fmt: skip

_FROM = {
    **dict.fromkeys(
        ["AIMPredictionHead", "CAPIPredictorTIMM", "IJEPAPredictorTIMM", "MaskedCausalVisionTransformer"],
        "timm_predictors",
    ),
    **dict.fromkeys(
        ["MaskedVisionTransformerDecoderTIMM", "MaskedVisionTransformerTIMM", "init_weights"], "timm_transformers"
    ),
    **dict.fromkeys(
        ["IJEPABackbone", "IJEPAEncoder", "IJEPAPredictor", "MaskedVisionTransformerTorchvision"],
        "torchvision_transformers",
    ),
}

globals().update(files_of("models.modules"))


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise absent(__name__, name)
    return getattr(importlib.import_module(f"fastjem.compat.{_FROM[name]}"), name)
