"""The methods, each a small module of the protocol in `fastjem.methods.protocol`, in a file of its own."""

from dataclasses import replace

from fastjem.data.batch import Batch, Masks
from fastjem.data.views import LARGEST_WITHOUT_BLUR, Views
from fastjem.encoders import Encoder, Features
from fastjem.methods.barlow_twins import BarlowTwins
from fastjem.methods.byol import BYOL
from fastjem.methods.data2vec import Data2Vec
from fastjem.methods.defaults import Defaults
from fastjem.methods.dino import DINO
from fastjem.methods.moco import MoCo
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts, options_of
from fastjem.methods.simclr import SimCLR
from fastjem.methods.simsiam import SimSiam
from fastjem.methods.swav import SwAV
from fastjem.methods.vicreg import VICReg

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
}


def views_of(
    method: str | Method | type[Method], image_size: int, small_views: int | None = None, recipe: str | None = None
) -> Views:
    """What a method sees, with what isn't None in place of its own.

    At 64 pixels and less no small views unless they are asked for: of 32 pixels they would have 14, blown up from 8,
    and hardly anything in them can be told; recipes for CIFAR leave them out.
    """
    views = METHODS[method].views if isinstance(method, str) else method.views
    if small_views is None and image_size <= LARGEST_WITHOUT_BLUR:
        small_views = 0
    return replace(
        views,
        small=views.small if small_views is None else small_views,
        recipe=views.recipe if recipe is None else recipe,
    )


__all__ = [
    "BYOL",
    "DINO",
    "METHODS",
    "About",
    "BarlowTwins",
    "Batch",
    "Branch",
    "Codes",
    "Data2Vec",
    "Defaults",
    "Encoder",
    "Features",
    "Masks",
    "Method",
    "MoCo",
    "RunFacts",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
    "options_of",
    "views_of",
]
