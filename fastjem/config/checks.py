"""What no configuration may be, and what a resumed run may be told anew."""

import math

import torch

from fastjem import backbones, optim
from fastjem.config.options import Config
from fastjem.data import statistics
from fastjem.data.levels import parsed_range
from fastjem.data.masking import MASKINGS_OF_RUNS
from fastjem.data.pixels import LARGEST
from fastjem.errors import UserError, nearest
from fastjem.trackers import names_of

LONGEST_WAIT = 1_000_000  # seconds; NCCL and gloo count milliseconds
MOST_VIEWS = 1000  # small ones of an image: each is a crop to be made and a row of the batch
# What a resumed run may be told anew: nothing of it changes a number,
MAY_CHANGE = {
    "out", "resume", "device", "workers", "log_every", "checkpoint_every", "checkpoint_steps", "keep_checkpoints",
    "tensorboard", "log", "compile", "data", "new_data", "knn_every", "report",
    "micro_batch", "shard", "activation_checkpointing", "timeout", "keep_best", "cuda_graph",
}  # fmt: skip
# but for these: what makes a run longer, or leads it away from where it diverged. The run says that they changed.
CHANGES_NUMBERS = ("epochs", "max_steps", "learning_rate", "clip", "precision")
AT_LEAST_ONE = ("channels", "epochs", "accumulate", "log_every", "keep_checkpoints")
NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "warmup_epochs", "clip", "momentum", "decoder_share", "small_views", "max_steps",
    "patch_size", "seed", "checkpoint_every", "checkpoint_steps", "knn_every", "memory", "layer_decay",
    "patch_embed_rate", "drop_path", "head_warmup_epochs", "mask",
    "micro_batch",
)  # fmt: skip
SHARES = ("momentum", "decoder_share", "layer_decay", "drop_path")


def check(config: Config) -> None:
    """Mistakes that need no file, no method and no model to be seen.

    Raises:
        UserError: for the first.
    """
    config.conform()  # once more, as its fields may have been set since it was made
    check_numbers(config)
    parsed_range(config.value_range)
    names_of(config.log)
    check_choices(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")


def check_choices(config: Config) -> None:
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


def check_numbers(config: Config) -> None:
    for name in AT_LEAST_ONE:
        if getattr(config, name) < 1:
            raise UserError(f"{config.flag(name)} must be at least 1, got {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{config.flag(name)} must be a finite number, at least 0, got {value}")
    if not 0 < config.timeout <= LONGEST_WAIT:
        raise UserError(f"--timeout must be seconds, above 0 and at most {LONGEST_WAIT:,}, got {config.timeout:g}")
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
