"""The methods, each a small module of the protocol in `fastjem.methods.protocol`, in a file of its own."""

from dataclasses import replace

from fastjem.data.batch import Batch, Masks
from fastjem.data.views import LARGEST_WITHOUT_BLUR, Views
from fastjem.encoders import Encoder, Features
from fastjem.methods.barlow_twins import BarlowTwins
from fastjem.methods.byol import BYOL
from fastjem.methods.clip import CLIP
from fastjem.methods.data2vec import Data2Vec
from fastjem.methods.dcl import DCL
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.dino import DINO
from fastjem.methods.distill import Distill
from fastjem.methods.empssl import EMPSSL
from fastjem.methods.frossl import FroSSL
from fastjem.methods.lejepa import LeJEPA
from fastjem.methods.mmcr import MMCR
from fastjem.methods.moco import MoCo
from fastjem.methods.mocov3 import MoCoV3
from fastjem.methods.nnclr import NNCLR
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts, options_of, preset_of
from fastjem.methods.ressl import ReSSL
from fastjem.methods.siglip import SigLIP
from fastjem.methods.simclr import SimCLR
from fastjem.methods.simsiam import SimSiam
from fastjem.methods.supcon import SupCon
from fastjem.methods.swav import SwAV
from fastjem.methods.tico import TiCo
from fastjem.methods.vicreg import VICReg
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
    "distill": Distill,
}


def views_of(
    method: str | Method | type[Method],
    image_size: int,
    small_views: int | None = None,
    recipe: str | None = None,
    preset: str = "imagenet",
) -> Views:
    """What a method sees, with the preset's and then with what isn't None in place of its own.

    At 64 pixels and less no small views unless they are asked for: of 32 pixels they would have 14, blown up from 8,
    and hardly anything in them can be told; recipes for CIFAR leave them out.
    """
    kind = METHODS[method] if isinstance(method, str) else method
    views = replace(kind.views, **preset_of(kind, preset).views)
    if small_views is None and image_size <= LARGEST_WITHOUT_BLUR:
        small_views = 0
    return replace(
        views,
        small=views.small if small_views is None else small_views,
        recipe=views.recipe if recipe is None else recipe,
    )


__all__ = [
    "BYOL",
    "CLIP",
    "DCL",
    "DINO",
    "EMPSSL",
    "METHODS",
    "MMCR",
    "NNCLR",
    "WMSE",
    "About",
    "BarlowTwins",
    "Batch",
    "Branch",
    "Codes",
    "Data2Vec",
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
    "SigLIP",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "SwAV",
    "TiCo",
    "VICReg",
    "VISReg",
    "Views",
    "options_of",
    "preset_of",
    "views_of",
]
