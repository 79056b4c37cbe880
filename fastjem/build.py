"""From a configuration to everything wired: `build` reads top to bottom, and `Training` is what the loop runs on."""

import dataclasses
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastjem import encoders, optim
from fastjem.config import Config
from fastjem.data import loaders
from fastjem.data.batch import finish
from fastjem.data.levels import describe, levels_of, parsed_range, survey
from fastjem.data.masks import mask_specs
from fastjem.data.pixels import Pixels
from fastjem.data.source import Levelled, Source, open_source
from fastjem.data.views import MaskSpec, ViewSpec
from fastjem.encoders import Encoder
from fastjem.errors import UserError, nearest
from fastjem.methods import METHODS, Defaults, Method, RunFacts, options_of, views_of
from fastjem.methods.protocol import option_types
from fastjem.ranks import Ranks
from fastjem.step import Step

ENCODER = "encoder.safetensors"
# Parameter groups, as `fastjem.optim.parameter_groups` makes them, -> an optimizer: a class of torch.optim, say.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Objects:
    """What a caller from Python gives in place of names.

    Raises:
        UserError: for what isn't one.
    """

    encoder: nn.Module | None = None  # [B, C, H, W] -> [B, D]
    method: type[Method] | Method | None = None
    source: Source | None = None
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        kind = self.method if isinstance(self.method, type) else type(self.method)
        expected = {
            "encoder must be a module [B, C, H, W] -> [B, D]": (self.encoder, isinstance(self.encoder, nn.Module)),
            "method must be a name, or a subclass of fastjem.methods.Method or an instance of one": (
                self.method,
                issubclass(kind, Method),
            ),
            "source must be an object with len and read, not its class": (
                self.source,
                not isinstance(self.source, type),
            ),
            "optimizer must be a name, or make one of parameter groups (torch.optim.AdamW, say)": (
                self.optimizer,
                callable(self.optimizer) and not isinstance(self.optimizer, torch.optim.Optimizer),
            ),
        }
        for contract, (given, right) in expected.items():
            if given is not None and not right:
                raise UserError(f"{contract}; got {given!r}")


@dataclass
class Training:
    """A run, ready to go."""

    config: Config
    out: Path
    ranks: Ranks
    source: Source
    specs: list[ViewSpec]
    masks: list[MaskSpec]
    pixels: Pixels
    loader: loaders.Loader
    step: Step  # the modules
    model: nn.Module  # what is called: `step`, or DDP or a compiled module around it
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    defaults: Defaults  # of the run as it was begun; --max-steps may change
    start: int  # the step that it goes on from
    done: int  # steps that were taken, those of before among them
    steps: int
    steps_per_epoch: int
    clip: float
    layout: dict[str, Any]  # dtype and memory format of the views
    notices: list[str] = field(default_factory=list)  # what the user is told before the first step

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.ranks.device.type == "cuda" else None

    def state(self, done: int) -> dict[str, torch.Tensor | Any]:
        """Model and optimizer behind step `done`, for a checkpoint."""
        return {
            "step": done,
            "model": self.step.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pixels": self.pixels.to_dict(),
        }


def build(config: Config, ranks: Ranks, objects: Objects, out: Path, state: dict[str, Any] | None) -> Training:
    """Wire a run.

    Args:
        state: the checkpoint to go on from; None: from the beginning.

    Raises:
        UserError: for what can't be done, with the reason.
    """
    check_own_encoder(config, objects)
    source, about_values = levelled(config, objects, state)
    check_batch(config, len(source), ranks)
    kind = objects.method or METHODS[config.method]
    steps_per_epoch = max(len(source) // config.batch_size // config.accumulate, 1)
    steps = config.max_steps or steps_per_epoch * config.epochs
    start = state["step"] if state else 0
    if start > steps or (start == steps and state and (out / ENCODER).exists()):
        raise UserError(f"the run in {out} is already at its end, step {start}; --epochs says how long it is")
    chosen = config.optimizer is not None or config.learning_rate is not None
    defaults = Defaults(**state["defaults"]) if state else kind.defaults.of_run(steps, chosen=chosen)

    torch.manual_seed(config.seed)
    module = objects.encoder if objects.encoder is not None else create_backbone(config, kind)
    encoder = checked_encoder(config, ranks, kind, module, source)
    facts = run_facts(config, ranks, encoder, source, steps, steps_per_epoch)
    method = kind if isinstance(kind, Method) else create_method(kind, encoder.width, facts, config)
    if method.views.mask and not encoders.is_transformer(module):
        raise UserError(f"{config.method}: {encoders.no_patches(module)}")
    specs = view_specs(config, method, module)
    loader = create_loader(config, ranks, source, specs, start, steps, state)
    try:
        step = Step(encoder, method.to(ranks.device), config.momentum_encoder).to(ranks.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.momentum is not None and not step.teacher:
        raise UserError(f"--momentum: {config.method} has no momentum encoder; --momentum-encoder gives it one")
    optimizer = create_optimizer(config, defaults, step, objects.optimizer)
    if state:
        step.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    optim.separate_groups(optimizer)  # behind the loading, which puts the saved tensors in
    if config.sync_batch_norm and ranks.size > 1:
        step = cast(Step, encoders.synchronize_batch_norm(step))
    return Training(
        config=config,
        out=out,
        ranks=ranks,
        source=source,
        specs=specs,
        masks=mask_specs(method.views, config.image_size, encoder.patch),
        pixels=Pixels.of(specs, source.levels),
        loader=loader,
        step=step,
        model=wrapped(config, ranks, step),
        optimizer=optimizer,
        schedule=create_schedule(config, defaults, steps, steps_per_epoch),
        defaults=defaults,
        start=start,
        done=start,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        clip=given_or(config.clip, defaults.clip),
        layout=view_layout(ranks, encoder, named=objects.encoder is None),
        notices=[
            *about_values,
            *notices(config, ranks, source, loader, "" if state else defaults.unlike(kind.defaults)),
        ],
    )


def levelled(config: Config, objects: Objects, state: dict[str, Any] | None) -> tuple[Levelled, list[str]]:
    """The images with what their values mean, and what there is to be told of it. A run keeps what it found first."""
    source = open_source(config.data if objects.source is None else objects.source)
    if state and "pixels" in state:
        return Levelled(source, Pixels.from_dict(state["pixels"]).levels), []
    found = survey(source, config.channels)
    levels = levels_of(config.channels, parsed_range(config.value_range), found)
    return Levelled(source, levels), describe(levels, found)


def given_or(value: Any, default: Any) -> Any:
    """What the user gave, or else the method's default."""
    return default if value is None else value


def check_batch(config: Config, images: int, ranks: Ranks) -> None:
    """UserError for a batch that the images or the ranks can't make."""
    if config.batch_size > images:
        raise UserError(f"--batch-size {config.batch_size} is more than the {images} images in {config.data}")
    if config.batch_size % ranks.size:
        raise UserError(f"--batch-size {config.batch_size} can't be shared evenly by {ranks.size} ranks")
    if config.batch_size // ranks.size < 2:
        raise UserError(f"--batch-size {config.batch_size} leaves a rank with less than 2 images")
    if config.sync_batch_norm and ranks.device.type != "cuda":
        raise UserError(f"--sync-batch-norm needs CUDA, and this run is on {ranks.device.type}")


def check_own_encoder(config: Config, objects: Objects) -> None:
    """UserError for options that say how a backbone is made, where the encoder is made already."""
    if objects.encoder is None:
        return
    for option in dataclasses.fields(config):
        if option.name in ("backbone", "stem", "patch_size") and getattr(config, option.name) != option.default:
            raise UserError(f"{config.flag(option.name)} says how a backbone is made, and the encoder is made already")


def create_backbone(config: Config, kind: type[Method] | Method) -> nn.Module:
    return encoders.create(
        config.backbone, config.image_size, stem=config.stem, patch=config.patch_size, pool=kind.pool,
        channels=config.channels,
    )  # fmt: skip


def view_specs(config: Config, kind: type[Method] | Method, module: nn.Module) -> list[ViewSpec]:
    """One for each view of an image, as the method and the configuration want them."""
    if config.small_views and not kind.views.small:
        raise UserError(f"--small-views: {config.method} compares exactly {kind.views.large} large views")
    views = views_of(kind, config.image_size, config.small_views, config.recipe)
    patch = encoders.patch_size(module)
    return views.specs(config.image_size, patch=patch, blur=config.blur, changes=config.view, channels=config.channels)


def create_loader(
    config: Config, ranks: Ranks, source: Source, specs: Sequence[ViewSpec], start: int, steps: int,
    state: dict[str, Any] | None,
) -> loaders.Loader:  # fmt: skip
    order = loaders.Order(
        samples=len(source),
        batch=config.batch_size,
        seed=config.seed,
        start=start * config.accumulate,
        stop=steps * config.accumulate,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    budget = loaders.Budget(
        workers=config.workers if config.workers >= 0 else ranks.cores,
        memory=config.memory,
        device=ranks.device,
        decoder_share=(state or {}).get("decoder_share", config.decoder_share),
        agree=ranks.agree,
    )
    return loaders.create(config.loader, source, specs, order, budget)


def checked_encoder(
    config: Config, ranks: Ranks, kind: type[Method] | Method, module: nn.Module, source: Source
) -> Encoder:
    """The module on its device as an `Encoder`, once it has embedded some of the run's images."""
    module = module.to(ranks.device)
    specs = view_specs(config, kind, module)
    order = loaders.Order(samples=len(source), batch=min(config.batch_size, 16), seed=config.seed, stop=1)
    crops = next(iter(loaders.LOADERS["torch"](source, specs, order, loaders.Budget())))
    channels_last = encoders.memory_format(module) == torch.channels_last
    images = finish(crops, specs, ranks.device, channels_last=channels_last).views[0]
    try:
        width = encoders.measured_width(module, images)
    except RuntimeError as error:
        size = config.image_size
        raise UserError(f"the encoder can't take {size} x {size} images: {error}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return encoders.wrap(module, width, mask_token=kind.mask_token).to(ranks.device)


def view_layout(ranks: Ranks, encoder: Encoder, *, named: bool) -> dict[str, Any]:
    """dtype and memory format of the views. named: the encoder is one of timm's, by its name."""
    # Half the bytes for what autocast would round anyway; a module of one's own may look at its images first.
    half = ranks.device.type == "cuda" and named
    channels_last = encoders.memory_format(encoder) == torch.channels_last
    return {"dtype": torch.bfloat16 if half else torch.float32, "channels_last": channels_last}


def run_facts(
    config: Config, ranks: Ranks, encoder: Encoder, source: Source, steps: int, steps_per_epoch: int
) -> RunFacts:
    return RunFacts(
        images=len(source),
        classes=len(source.classes),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        batch=config.batch_size,
        accumulate=config.accumulate,
        ranks=ranks.size,
        seed=config.seed,
        image_size=config.image_size,
        channels=config.channels,
        patch=encoder.patch,
        prefix_tokens=encoder.prefix_tokens,
        batch_norm=encoders.has_batch_norm(encoder),
        group=ranks.group,
    )


def create_method(kind: type[Method], width: int, run: RunFacts, config: Config) -> Method:
    """The method with the user's options; UserError for one that there isn't, or a value that it can't have."""
    options = options_of(kind)
    for name, value in config.options.items():
        if name not in options:
            raise nearest(f"option of {config.method}", name, options)
        types_of_option = option_types(kind, name)
        allowed = types_of_option | {int} if float in types_of_option else types_of_option
        if type(value) not in allowed:
            raise UserError(f"--options {name} is {options[name]} by default and can't be {value!r}")
        least = int(options[name] != 0)  # none of what counts something can be 0, but where that is the default
        if isinstance(value, int) and types_of_option <= {int, types.NoneType} and value < least:
            raise UserError(f"--options {name} must be at least {least}, got {value}")
    try:
        return kind(width, run, **config.options)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def create_optimizer(
    config: Config, defaults: Defaults, step: Step, make: MakeOptimizer | None
) -> torch.optim.Optimizer:
    groups = optim.parameter_groups(step, step.method.constant_rate)
    if make is not None:
        optimizer = make(groups)
        kept = isinstance(optimizer, torch.optim.Optimizer) and all(
            {"decays", "constant_rate"} <= group.keys() for group in optimizer.param_groups
        )
        if not kept:
            raise UserError(f"optimizer must make a torch.optim.Optimizer of the groups it is given, got {optimizer!r}")
        return optimizer
    return optim.build(given_or(config.optimizer, defaults.optimizer), groups)


def create_schedule(config: Config, defaults: Defaults, steps: int, steps_per_epoch: int) -> optim.Schedule:
    """Learning rate, weight decay and momentum over the run: the method's, but for what the user gave."""
    optimizer = given_or(config.optimizer, defaults.optimizer)
    rate = given_or(config.learning_rate, defaults.learning_rate)
    warmup_epochs = given_or(config.warmup_epochs, defaults.warmup_epochs)
    momentum = given_or(config.momentum, defaults.momentum)
    weight_decay = given_or(config.weight_decay, defaults.weight_decay)
    final_weight_decay = weight_decay
    if config.weight_decay is None and defaults.final_weight_decay is not None:
        final_weight_decay = defaults.final_weight_decay
    return optim.Schedule(
        steps=steps,
        learning_rate=optim.scaled(optimizer, rate, config.batch_size * config.accumulate),
        warmup=min(round(warmup_epochs * steps_per_epoch), steps // 10),
        weight_decay=weight_decay,
        final_weight_decay=final_weight_decay,
        momentum=momentum,
        final_momentum=1.0 if defaults.final_momentum == 1 else momentum,
    )


def wrapped(config: Config, ranks: Ranks, step: Step) -> nn.Module:
    """`step` as the loop calls it."""
    model: nn.Module = step
    if ranks.size > 1:
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        # Batch norm's running statistics stay each rank's own; queue and centre are equal on all ranks by construction.
        model = nn.parallel.DistributedDataParallel(step, device_ids=device_ids, broadcast_buffers=False)
    return torch.compile(model) if config.compile else model  # type: ignore[return-value]


def notices(config: Config, ranks: Ranks, source: Source, loader: loaders.Loader, about_defaults: str) -> list[str]:
    said = [about_defaults] if about_defaults else []
    loader_was_chosen = config.loader == "auto" and (ranks.device.type == "cuda" or source.decoded)
    if loader_was_chosen or config.loader not in ("auto", "torch"):
        said.append(loader.reads)
    return said


__all__ = ["ENCODER", "MakeOptimizer", "Objects", "Training", "build", "create_method"]
