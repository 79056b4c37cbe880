"""The methods, each a small module of the protocol in `fastjem.methods.protocol`, in a file of its own."""

from dataclasses import replace

from fastjem.data.batch import Batch, Masks
from fastjem.data.size import Size, shorter
from fastjem.data.views import LARGEST_WITHOUT_BLUR, Views
from fastjem.encoders import Encoder, Features
from fastjem.methods.all4one import All4One
from fastjem.methods.barlow_twins import BarlowTwins
from fastjem.methods.byol import BYOL
from fastjem.methods.capi import CAPI
from fastjem.methods.clip import CLIP
from fastjem.methods.data2vec import Data2Vec
from fastjem.methods.dcl import DCL
from fastjem.methods.deepcluster import DeepCluster
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.dino import DINO
from fastjem.methods.dinov2 import DINOv2
from fastjem.methods.dinov3 import DINOv3
from fastjem.methods.distill import Distill
from fastjem.methods.empssl import EMPSSL
from fastjem.methods.frossl import FroSSL
from fastjem.methods.ibot import IBOT
from fastjem.methods.ijepa import IJEPA
from fastjem.methods.lejepa import LeJEPA
from fastjem.methods.mae import MAE
from fastjem.methods.mmcr import MMCR
from fastjem.methods.moco import MoCo
from fastjem.methods.mocov3 import MoCoV3
from fastjem.methods.msn import MSN, PMSN
from fastjem.methods.nnclr import NNCLR
from fastjem.methods.pirl import PIRL
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts, needs_patches, options_of, preset_of
from fastjem.methods.ressl import ReSSL
from fastjem.methods.siglip import SigLIP
from fastjem.methods.simclr import SimCLR
from fastjem.methods.simdino import SimDINO, SimDINOv2
from fastjem.methods.simsiam import SimSiam
from fastjem.methods.smog import SMoG
from fastjem.methods.supcon import SupCon
from fastjem.methods.swav import SwAV
from fastjem.methods.tico import TiCo
from fastjem.methods.vicreg import VICReg
from fastjem.methods.vicregl import VICRegL
from fastjem.methods.visreg import VISReg
from fastjem.methods.wmse import WMSE

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "swav": SwAV,
    "dino": DINO,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "data2vec": Data2Vec,
    "dcl": DCL,
    "supcon": SupCon,
    "clip": CLIP,
    "siglip": SigLIP,
    "mocov3": MoCoV3,
    "nnclr": NNCLR,
    "ressl": ReSSL,
    "tico": TiCo,
    "wmse": WMSE,
    "mmcr": MMCR,
    "frossl": FroSSL,
    "empssl": EMPSSL,
    "lejepa": LeJEPA,
    "visreg": VISReg,
    "ijepa": IJEPA,
    "mae": MAE,
    "ibot": IBOT,
    "dinov2": DINOv2,
    "dinov3": DINOv3,
    "simdino": SimDINO,
    "simdinov2": SimDINOv2,
    "msn": MSN,
    "pmsn": PMSN,
    "deepcluster": DeepCluster,
    "smog": SMoG,
    "pirl": PIRL,
    "vicregl": VICRegL,
    "all4one": All4One,
    "capi": CAPI,
    "distill": Distill,
}


def views_of(
    method: str | Method | type[Method],
    image_size: Size,
    small_views: int | None = None,
    recipe: str | None = None,
    preset: str = "imagenet",
    large_views: int | None = None,
) -> Views:
    """What a method sees, with the preset's and then with what isn't None in place of its own.

    At 64 pixels and less, of the shorter side, no small views unless they are asked for: of 32 pixels they would have
    14, blown up from 8, and hardly anything in them can be told; recipes for CIFAR leave them out.
    """
    kind = METHODS[method] if isinstance(method, str) else method
    views = replace(kind.views, **preset_of(kind, preset).views)
    if small_views is None and shorter(image_size) <= LARGEST_WITHOUT_BLUR:
        small_views = 0
    return replace(
        views,
        large=views.large if large_views is None else large_views,
        small=views.small if small_views is None else small_views,
        recipe=views.recipe if recipe is None else recipe,
    )


__all__ = [
    "BYOL",
    "CAPI",
    "CLIP",
    "DCL",
    "DINO",
    "EMPSSL",
    "IBOT",
    "IJEPA",
    "MAE",
    "METHODS",
    "MMCR",
    "MSN",
    "NNCLR",
    "PIRL",
    "PMSN",
    "WMSE",
    "About",
    "All4One",
    "BarlowTwins",
    "Batch",
    "Branch",
    "Codes",
    "DINOv2",
    "DINOv3",
    "Data2Vec",
    "DeepCluster",
    "Defaults",
    "Distill",
    "Encoder",
    "Features",
    "FroSSL",
    "LeJEPA",
    "Masks",
    "Method",
    "MoCo",
    "MoCoV3",
    "Preset",
    "ReSSL",
    "RunFacts",
    "SMoG",
    "SigLIP",
    "SimCLR",
    "SimDINO",
    "SimDINOv2",
    "SimSiam",
    "SupCon",
    "SwAV",
    "TiCo",
    "VICReg",
    "VICRegL",
    "VISReg",
    "Views",
    "needs_patches",
    "options_of",
    "preset_of",
    "views_of",
]
