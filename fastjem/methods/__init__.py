"""The methods: each a small module with its views, its heads, its defaults and its loss.

A method is `Method(width, ...)` with `views` (data), `ema` (what has a momentum copy), `defaults` (what the paper
trained with) and `loss(student, teacher, views, step)`. `fastjem.train.Step` holds one with an encoder.
"""

from dataclasses import replace

from torch import nn

from fastjem.data.views import LARGEST_WITHOUT_BLUR, Views
from fastjem.methods._parts import Defaults
from fastjem.methods.barlow_twins import BarlowTwins
from fastjem.methods.byol import BYOL
from fastjem.methods.data2vec import Data2Vec
from fastjem.methods.dino import DINO
from fastjem.methods.moco import MoCo
from fastjem.methods.simclr import SimCLR
from fastjem.methods.simsiam import SimSiam
from fastjem.methods.swav import SwAV
from fastjem.methods.vicreg import VICReg

METHODS: dict[str, type[nn.Module]] = {
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

# Arguments of a method that the run gives; every other one is the user's option.
FACTS = ("images", "steps_per_epoch", "steps", "group", "batch_norm")


def views_of(method: str, image_size: int, small_views: int | None = None, recipe: str | None = None) -> Views:
    """What a method sees, with what isn't None in place of its own.

    At 64 pixels and less no small views unless they are asked for: of 32 pixels they would have 14, blown up from 8,
    and hardly anything in them can be told; recipes for CIFAR leave them out.
    """
    views: Views = METHODS[method].views
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
    "FACTS",
    "METHODS",
    "BarlowTwins",
    "Data2Vec",
    "Defaults",
    "MoCo",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
    "views_of",
]
