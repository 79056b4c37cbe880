"""Everything a run depends on: filled in by the command line or `fastjem.pretrain(...)`, kept in the run's folder."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastjem import backbones, fields, optim, reading, yaml_text
from fastjem.data import statistics
from fastjem.data.levels import parsed_range
from fastjem.data.loaders import NAMES
from fastjem.data.masking import MASKINGS_OF_RUNS
from fastjem.data.pixels import LARGEST, Pixels
from fastjem.data.size import Size, written
from fastjem.data.sources import naming
from fastjem.data.stages import Sizes
from fastjem.data.views import RECIPES
from fastjem.errors import UserError, nearest
from fastjem.trackers import TRACKERS, names_of

FILE = "config.yaml"
OUT = "runs/METHOD"
MOST_VIEWS = 1000  # small ones of an image: each is a crop to be made and a row of the batch
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
    device: str = field(default="auto", metadata={"help": "auto | cpu | cuda", "device": True})
    loader: str = field(default="auto", metadata={"help": f"who reads the images: {' | '.join(NAMES)}"})
    memory: float = field(default=4.0, metadata={"help": "GiB that --loader memory may take"})
    decoder_share: float | None = field(
        default=None, metadata={"help": "of JPEG files, for a GPU's fixed-function decoder; none: measured"}
    )
    workers: int = field(default=-1, metadata={"help": "of the data loader, a rank; -1: one a core"})
    seed: int = 0
    compile: bool = False
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


# What a resumed run may be told anew: nothing of it changes a number,
MAY_CHANGE = {
    "out", "resume", "device", "workers", "log_every", "checkpoint_every", "checkpoint_steps", "keep_checkpoints",
    "tensorboard", "log", "compile", "data", "new_data", "knn_every", "report",
}  # fmt: skip
# but for these: what makes a run longer, or leads it away from where it diverged. The run says that they changed.
CHANGES_NUMBERS = ("epochs", "max_steps", "learning_rate", "clip", "precision")
AT_LEAST_ONE = ("channels", "epochs", "accumulate", "log_every", "keep_checkpoints")
NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "warmup_epochs", "clip", "momentum", "decoder_share", "small_views", "max_steps",
    "patch_size", "seed", "checkpoint_every", "checkpoint_steps", "knn_every", "memory", "layer_decay",
    "patch_embed_rate", "drop_path", "head_warmup_epochs", "mask",
)  # fmt: skip
SHARES = ("momentum", "decoder_share", "layer_decay", "drop_path")


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


def check(config: Config) -> None:
    """Mistakes that need no file, no method and no model to be seen.

    Raises:
        UserError: for the first.
    """
    config.conform()  # once more, as its fields may have been set since it was made
    _check_numbers(config)
    parsed_range(config.value_range)
    names_of(config.log)
    _check_choices(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")


def _check_choices(config: Config) -> None:
    if config.device.startswith("cuda:"):
        raise UserError(
            f"--device {config.device}: a run takes the GPU of its rank; CUDA_VISIBLE_DEVICES chooses another"
        )
    choices = {
        "stem": backbones.STEMS,
        "device": ("auto", "cpu", "cuda"),
        "optimizer": (*optim.OPTIMIZERS, None),
        "masking": (*MASKINGS_OF_RUNS, None),
    }
    if config.weights is None and config.weights_of != "encoder":
        raise UserError(f"--weights-of {config.weights_of} is for --weights")
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise nearest(name, getattr(config, name), [a for a in allowed if a])


def _check_numbers(config: Config) -> None:
    for name in AT_LEAST_ONE:
        if getattr(config, name) < 1:
            raise UserError(f"{config.flag(name)} must be at least 1, got {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{config.flag(name)} must be a finite number, at least 0, got {value}")
    for name in SHARES:
        value = getattr(config, name)
        if value is not None and value > 1:
            raise UserError(f"{config.flag(name)} must be between 0 and 1, got {value}")
    if config.channels > LARGEST:
        raise UserError(f"--channels must be at most {LARGEST}, got {config.channels}")
    for name in ("large_views", "small_views"):
        if (getattr(config, name) or 0) > MOST_VIEWS:
            raise UserError(f"{config.flag(name)} must be at most {MOST_VIEWS}, got {getattr(config, name)}")
    if config.large_views is not None and config.large_views < 2:
        raise UserError(f"--large-views must be at least 2, as views are compared, got {config.large_views}")
    projector_widths(config.projector)
    for name in ("mean", "std"):
        statistics.parsed(config.flag(name), getattr(config, name), config.channels)
        if getattr(config, name) is not None and name in config.view:
            raise UserError(f"{config.flag(name)} and --view {name}=... say the same; one of them is enough")
    if config.mask is not None and config.mask >= 1:
        raise UserError(f"--mask must be a share of the patches below 1, got {config.mask:g}")
    if config.layer_decay == 0:
        raise UserError("--layer-decay must be above 0 (1: all layers learn alike), got 0")
    if config.drop_path == 1:
        raise UserError("--drop-path must be below 1, as 1 leaves out whole blocks, got 1")
    if config.workers < -1:
        raise UserError(f"--workers must be at least 0, or -1 for one a core, got {config.workers}")
    if config.batch_size < 2:
        raise UserError(f"--batch-size must be at least 2, as every method compares images, got {config.batch_size}")


def projector_widths(given: str | None) -> tuple[int, ...]:
    """Of `--projector 512,128`; () where nothing is given. UserError for what isn't widths."""
    if given is None:
        return ()
    try:
        widths = tuple(int(width) for width in given.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise UserError(f"--projector must be widths of layers, as 512,128, each at least 1, got {given}")
    return widths


# What decides which network a run has, and which images: none of it may be guessed when a run is opened again.
NEEDED = ("out", "data", "method", "backbone", "image_size", "stem", "patch_size")


def read(out: Path) -> tuple[Config, Pixels, str | None]:
    """The configuration of the run in a folder, how pixels become numbers in it, and how tokens become an embedding.

    Raises:
        UserError: where there is none, one of an earlier version, or one that is damaged or somebody else's; it names
            the file and the key.
    """
    config, given = read_options(out)
    path = out / FILE
    if "pixels" not in given:
        raise UserError(
            f"{path} has no pixels: it is cut off, or of an earlier version of fastjem, whose runs this one can't open"
        )
    pool = given.get("pool", "")
    if pool == "" or not isinstance(pool, str | None):
        raise UserError(f"{path}: pool must be text or None, got {fields.came(pool)}")
    with reading.named(path):
        pixels = Pixels.from_dict(given["pixels"])
        if pixels.size != config.size:
            raise UserError(f"pixels' size is {written(pixels.size)}, and image_size {config.image_size}")
    return config, pixels, pool


def read_options(out: Path) -> tuple[Config, dict[str, Any]]:
    """(the configuration of the run in a folder, all that its file says), of an earlier version too; see `read`."""
    path = out / FILE
    try:
        given = yaml_text.loaded(reading.content(path), path)
    except reading.Missing:
        raise UserError(f"there is no run in {out} (a run folder has a {FILE})") from None
    known = [f.name for f in dataclasses.fields(Config)]
    if not set(known) & given.keys():
        raise UserError(f"{path} is no run's configuration: it has none of a run's keys")
    lacking = [name for name in NEEDED if name not in given]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}")
    with reading.named(path):
        values = fields.conformed(Config, {name: given[name] for name in known if name in given})
        values["backbone"] = backbones.architecture(values["backbone"])  # earlier versions took a tag and ignored it
        values["data"] = _found_again(values["data"], given.get("data_at"))
        config = Config(**values)
        config.given = _given(given)
        _check_numbers(config)
        _check_choices(config)
    return config, given


def _given(kept: dict[str, Any]) -> frozenset[str]:
    """Names of the options that were chosen when a run began; of runs of before that was kept: those that aren't as by
    default."""
    known = {f.name: f for f in dataclasses.fields(Config)}
    if "given" not in kept:
        return frozenset(name for name in known if name in kept and kept[name] not in (known[name].default, {}))
    if not isinstance(kept["given"], dict):
        raise UserError(f"given must be values by name, got {fields.came(kept['given'])}")
    return frozenset(kept["given"]) & frozenset(known)


def _found_again(data: str | None, data_at: object) -> str | None:
    """The run's data; `data_at` where `data` is relative and nothing is there from the present folder."""
    if not isinstance(data_at, str | None):
        raise UserError(f"data_at must be text, got {fields.came(data_at)}")
    if data is None or data_at is None or naming.exists(data) or not naming.exists(data_at):
        return data
    return data_at


def check_resumed(config: Config, before: Config) -> None:
    """UserError if what a resumed run is told now can't be changed any more. What isn't told stays as it was."""
    for name in sorted(config.given - MAY_CHANGE - set(CHANGES_NUMBERS)):
        old = getattr(before, name)
        new = getattr(config, name)
        if isinstance(old, dict) and old == {**old, **new}:
            continue  # of several values those that are told are the same
        if old != new:
            raise UserError(
                f"--resume: {config.flag(name)} was {old} in this run and is {new} now; without it the run goes on as "
                "it was begun, and another --out begins another run"
            )
