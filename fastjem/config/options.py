"""Everything a run depends on, as one dataclass: what the command line and `fastjem.pretrain(...)` fill in."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastjem import fields, optim
from fastjem.data.loaders import NAMES
from fastjem.data.masking import MASKINGS_OF_RUNS
from fastjem.data.size import Size
from fastjem.data.sources import naming
from fastjem.data.stages import Sizes
from fastjem.data.views import RECIPES
from fastjem.errors import UserError, nearest
from fastjem.trackers import TRACKERS

OUT = "runs/METHOD"
Option = bool | int | float | str


@dataclass
class Config:
    """Everything a run depends on. A field that is None takes the method's default (docs/methods.md)."""

    out: str = field(
        default=OUT,
        metadata={
            "help": "folder of the run; else runs/ and the method's name, with a number where that is taken",
            "path": True,
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "folder, list, tar files, tables, arrays, s3://... too; a,b:0.3: both; none: the embedded data set",
            "path": True,
        },
    )
    method: str = field(default="simclr", metadata={"help": "its name; fastjem methods lists them"})
    backbone: str = field(default="resnet18", metadata={"help": "a timm model, or vit_tiny, vit_small, vit_base"})
    weights: str | None = field(
        default=None,
        metadata={
            "help": "to begin with: a run, an export, timm/MODEL.TAG, hf-hub:USER/MODEL, local-dir:FOLDER",
            "path": True,
        },
    )
    weights_of: Literal["encoder", "teacher", "all"] = field(
        default="encoder",
        metadata={"help": "a run's encoder, its momentum encoder, or all of it, heads and momentum copies too"},
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "parts of the encoder that stay as they are: patch_embed,blocks.0", "pair": True},
    )
    head_warmup_epochs: float = field(default=0.0, metadata={"help": "in which the heads alone learn"})
    image_size: int | str = field(
        default=224,
        metadata={
            "help": "of the large views; 224x448: height x width; 112:75%,224: smaller ones for 75 % of the steps",
            "sides": True,
            "metavar": "PIXELS",
        },
    )
    channels: int = field(
        default=3,
        metadata={"help": "of the images: 3: colours of any picture; 1: its gray; else as many as files have"},
    )
    value_range: str = field(
        default="auto",
        metadata={
            "help": "LOW,HIGH: black and white of images that aren't 8-bit; auto: by the data set",
            "pair": True,
        },
    )
    mean: str | None = field(
        default=None,
        metadata={"help": "of images from 0 to 1, by channel: 0.5 or 0.5,0.4,0.3; the recipe's", "pair": True},
    )
    std: str | None = field(default=None, metadata={"help": "the same: what images are divided by", "pair": True})
    statistics: Literal["published", "measure"] = field(
        default="published", metadata={"help": "measure: mean and deviation of these images, not ImageNet's"}
    )
    epochs: int = 100
    batch_size: int = field(
        default=256, metadata={"help": "images of one forward pass over all ranks; by default less of little data"}
    )
    accumulate: int = field(default=1, metadata={"help": "batches that make one optimiser step"})
    micro_batch: int = field(
        default=0,
        metadata={
            "help": "images of the encoder's passes within a batch, whose loss and gradient stay the whole batch's "
            "(GradCache); 0: one pass"
        },
    )
    max_steps: int = field(default=0, metadata={"help": "end after so many steps; 0: after the epochs"})
    optimizer: str | None = field(default=None, metadata={"help": " | ".join(optim.OPTIMIZERS)})
    learning_rate: float | None = field(
        default=None, metadata={"help": "for 256 images; grows with the batch, or its root"}
    )
    weight_decay: float | None = None
    warmup_epochs: float | None = field(default=None, metadata={"help": "at most a tenth of the run"})
    layer_decay: float | None = field(
        default=None, metadata={"help": "of the encoder's rate from layer to layer away from the heads; 1: none"}
    )
    patch_embed_rate: float | None = field(default=None, metadata={"help": "a factor on the patch embedding's rate"})
    clip: float | None = field(default=None, metadata={"help": "the gradient's largest norm; 0: no clipping"})
    momentum: float | None = field(default=None, metadata={"help": "of the momentum encoder at the start"})
    momentum_encoder: bool | None = field(default=None, metadata={"help": "give any method one, or take it away"})
    preset: str = field(
        default="imagenet",
        metadata={"help": "whose values a method takes: imagenet: the paper's; fastjem methods NAME lists others"},
    )
    options: dict[str, Option] = field(default_factory=dict, metadata={"help": "the method's own: temperature=0.2 ..."})
    large_views: int | None = field(default=None, metadata={"help": "whole ones of an image, each a target of others"})
    small_views: int | None = field(default=None, metadata={"help": "multi-crop's; none at 64 pixels and less"})
    mask: float | None = field(
        default=None,
        metadata={"help": "share of the patches that any method's transformer isn't given of each view: 0.75"},
    )
    masking: str | None = field(default=None, metadata={"help": f"of --mask: {' | '.join(MASKINGS_OF_RUNS)}"})
    projector: str | None = field(
        default=None,
        metadata={"help": "widths of its layers, the last its output: 512,128; the method's own", "pair": True},
    )
    recipe: str | None = field(default=None, metadata={"help": f"augmentation: {', '.join(RECIPES)}"})
    view: dict[str, Option | list[float]] = field(
        default_factory=dict,
        metadata={"help": "fields of its views: flip=0 small.scale=0.05,0.2 ..."},
    )
    blur: bool | None = field(default=None, metadata={"help": "as the recipe says; off at 64 pixels and less"})
    stem: str = field(default="auto", metadata={"help": "auto | standard | small"})
    patch_size: int = field(default=0, metadata={"help": "of a ViT; 0: its own", "square": True})
    drop_path: float | None = field(
        default=None, metadata={"help": "rate of stochastic depth in the trained encoder; 0: none"}
    )
    sync_batch_norm: bool = field(default=False, metadata={"help": "statistics over all ranks (CUDA)"})
    shard: bool = field(
        default=False, metadata={"help": "weights and the optimiser's state in shards over the ranks (FSDP2)"}
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "the encoder's blocks are computed again in the backward pass, not kept"}
    )
    timeout: float = field(default=600, metadata={"help": "seconds that ranks wait for one that doesn't come"})
    device: str = field(default="auto", metadata={"help": "auto | cpu | cuda", "device": True})
    loader: str = field(default="auto", metadata={"help": f"who reads the images: {' | '.join(NAMES)}"})
    memory: float = field(default=4.0, metadata={"help": "GiB that --loader memory may take"})
    decoder_share: float | None = field(
        default=None, metadata={"help": "of JPEG files, for a GPU's fixed-function decoder; none: measured"}
    )
    workers: int = field(default=-1, metadata={"help": "of the data loader, a rank; -1: one a core"})
    seed: int = 0
    compile: bool = False
    cuda_graph: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={"help": "a whole step as one launch of a GPU's; auto: where it can be; off: its kernels one by one"},
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto",
        metadata={"help": "auto: bf16 on GPUs since Ampere, fp16 on older ones, fp32 on CPUs"},
    )
    log: str | None = field(
        default=None,
        metadata={"help": f"figures go there, too: {','.join(TRACKERS)}, one or several", "pair": True},
    )
    tensorboard: bool = field(default=False, metadata={"help": "--log tensorboard"})
    log_every: int = field(default=10, metadata={"help": "steps; every step, or every few, of a short run"})
    checkpoint_every: float = field(default=300, metadata={"help": "seconds"})
    checkpoint_steps: int = field(default=0, metadata={"help": "steps, in place of seconds"})
    keep_checkpoints: int = field(default=2, metadata={"help": "the last ones, for where the newest is damaged"})
    keep_best: bool = field(default=True, metadata={"help": "keep the checkpoint of the best kNN accuracy, too"})
    knn_every: float | None = field(
        default=None, metadata={"help": "epochs; 0: at start and end; a twentieth of the run"}
    )
    teacher: bool = field(
        default=False,
        metadata={"help": "kNN, pictures and encoder.safetensors are the momentum encoder's, not the trained one's"},
    )
    report: bool = field(default=True, metadata={"help": "report.html in the run's folder, new at each checkpoint"})
    resume: bool | Literal["auto"] = field(
        default=False, metadata={"help": "go on with the run in --out, by its own options; auto: or begin one"}
    )
    new_data: bool = field(default=False, metadata={"help": "resume although the images have changed"})

    given = frozenset[str]()  # names of the fields that somebody chose, be it their defaults

    def __new__(cls, *values: Any, **fields: Any) -> "Config":
        """Note what is given: a resumed run is held to that, and takes everything else from its folder."""
        config = super().__new__(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        config.given = frozenset({*names[: len(values)], *fields})
        return config

    def __post_init__(self) -> None:
        self.conform()

    def conform(self) -> None:
        """Every field in its own type; UserError for one that can't be."""
        fields.conform(self, "pretrain: {}".format)
        self.image_size = self.sizes.given

    @property
    def sizes(self) -> Sizes:
        """Of the large views, stage after stage."""
        return Sizes.of(self.image_size)

    @property
    def size(self) -> Size:
        """Pixels of the large views in the last stage, for which the encoder is made."""
        return self.sizes.last

    def with_values(self, **values: Any) -> "Config":
        """A copy with other values, of which nothing counts as given that didn't before."""
        changed = dataclasses.replace(self, **values)
        changed.given = self.given
        return changed

    def flag(self, name: str) -> str:
        """A field's name as the command line has it."""
        return f"--{name.replace('_', '-')}"


def from_fields(given: dict[str, Any]) -> Config:
    """The configuration of `fastjem.pretrain(**given)`; UserError for a field that there isn't, or a value of another
    type than the field's.
    """
    known = [f.name for f in dataclasses.fields(Config)]
    for name in given:
        if name not in known:
            raise nearest("option", name, known)
    data = given.get("data")
    if isinstance(data, (list, tuple)) and data and all(isinstance(one, (str, os.PathLike)) for one in data):
        given = {**given, "data": joined(data)}
    return Config(**given)


def joined(roots: Sequence[str | os.PathLike[str]]) -> str:
    """Several sources as `--data` names them, "a,b:0.3"; UserError for a name that this would cut in two."""
    names = [os.fspath(root) for root in roots]
    whole = naming.SEPARATOR.join(names)
    if len(naming.split(whole)) != len(names):
        parted = next((name for name in names if len(naming.split(name)) > 1), whole)
        raise UserError(f"of several data, none may have a comma in its name; got {parted}")
    return whole
