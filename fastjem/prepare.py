"""What a rank makes of a configuration by itself: source, encoder and method, checked before ranks wait for others."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from fastjem import backbones, batching, checkpoints, encoders, optim, precision, resume, starting
from fastjem.config import Config, projector_widths
from fastjem.data import loaders
from fastjem.data.batch import finish
from fastjem.data.fingerprint import fingerprint
from fastjem.data.levels import describe, levels_of, parsed_range, survey
from fastjem.data.masking import mask_specs, masks_of_run
from fastjem.data.pixels import Pixels
from fastjem.data.size import Size, height_and_width, shorter
from fastjem.data.source import Levelled, Source, open_sources, parts_of
from fastjem.data.stages import Stage, told
from fastjem.data.views import LARGEST_WITHOUT_BLUR, ViewSpec
from fastjem.encoders import Encoder
from fastjem.errors import UserError, first_line, nearest
from fastjem.given import Weights
from fastjem.methods import METHODS, Defaults, Method, RunFacts, combinations, options_of, preset_of, views_of
from fastjem.methods.defaults import SHORT, SMALL
from fastjem.methods.narrower import with_small_widths
from fastjem.methods.protocol import option_types
from fastjem.ranks import Ranks

ENCODER = "encoder.safetensors"
BY_DEPTH = ("drop_path", "layer_decay", "patch_embed_rate")  # options that are the method's own in a long run alone
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
class Parts:
    """What a rank makes of a run by itself, without a word to the others."""

    config: Config  # with what it left to the weights, and to the method where that depends on the encoder
    weights: Weights | None  # that a new run begins with
    source: Levelled
    encoder: Encoder
    method: Method
    stages: list[Stage]
    defaults: Defaults
    steps: int
    steps_per_epoch: int
    facts: dict[str, Any]
    notices: list[str]


def prepare(config: Config, ranks: Ranks, objects: Objects, out: Path, state: dict[str, Any] | None) -> Parts:
    """Source, encoder and method of a run, checked; every mistake that needs them to be seen is found here."""
    if state:
        resume.check_objects(state, vars(objects))
    kind = objects.method or METHODS[config.method]
    weights = None if state else starting.opened(config)
    if weights is not None:
        replaced = kind.projector_options if "projector" in config.given else ()
        config = starting.taken_over(config, weights, made=isinstance(kind, Method), replaced=replaced)
    combinations.check(config, kind)
    source, about_values = levelled(config, objects, state, kind.views.sources)
    an_epoch = loaders.images_per_epoch(len(source), parts_of(source))
    if config.sync_batch_norm and ranks.device.type != "cuda":
        raise UserError(f"--sync-batch-norm needs CUDA, and this run is on {ranks.device.type}")
    config, about_batch = batching.fitted(config, an_epoch, ranks, new=state is None)
    steps_per_epoch = max(an_epoch // config.batch_size // config.accumulate, 1)
    steps = config.max_steps or steps_per_epoch * config.epochs
    images = fingerprint(source)
    chosen = config.optimizer is not None or config.learning_rate is not None
    preset = preset_of(kind, config.preset)
    published = preset.defaults or kind.defaults
    defaults = resume.defaults_of(out, state) if state else published.of_run(steps, chosen=chosen)
    # Of the data that the run was begun with: prototypes and queues have their size of it.
    sized_for = {"images": len(source), "classes": len(source.classes)}
    given = config.given
    said = [*unused_options(config, objects), *about_values, about_batch]
    asked = config
    config = with_drop_path(config, objects, kind, defaults)
    borders = resume.borders(config, state, steps)
    if state:
        said += [resume.check_images(config, state, images), *resume.changes(config, state, steps)]
        resume.check_length(config, state, steps, complete=is_complete(out))
        sized_for = state.get("sized_for", sized_for)
    if weights is not None:
        said.append(starting.told(config, weights))
        sized_for = starting.sized_for(config, weights) or sized_for
    torch.manual_seed(config.seed)
    module = made_encoder(config, objects, kind, weights)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if not state:
        transformer = encoders.is_transformer(module)
        defaults = published.of_run(steps, chosen=chosen, parameters=parameters, transformer=transformer)
        said.append(defaults.unlike(published))
    config = with_layer_rates(config, defaults, module)
    if not state:
        longer = with_layer_rates(with_drop_path(asked, objects, kind, published), published, module)
        said.append(left_out(config, longer))
    normalised, measured = starting.normalisation(config, source, weights, state)
    said.append(measured)
    sizes = (spec.size for size in config.sizes.pixels for spec in view_specs(config, kind, module, normalised, size))
    if preset.mask and not state and config.mask is None and encoders.shows_enough(module, min(sizes, key=shorter)):
        config = replace(config, mask=preset.mask)
        said.append(f"--preset {config.preset} leaves out {preset.mask:.0%} of each view's patches; --mask 0 doesn't")
    if config.masking is not None and not config.mask:
        raise UserError(f"--masking {config.masking} is for --mask")
    encoder = checked_encoder(config, ranks, kind, module, source, normalised)
    facts = replace(run_facts(config, ranks, encoder, source, steps, steps_per_epoch), **sized_for)
    if not state and steps < SHORT and parameters < SMALL:
        config, narrower = with_small_widths(config, kind, encoder.width)
        said.append(narrower)
    method = kind if isinstance(kind, Method) else create_method(kind, encoder.width, facts, config)
    large = {} if config.large_views is None else {"large": config.large_views}
    method.views = replace(method.views, **{**preset.views, **large})
    if (method.views.mask or config.mask) and not encoders.takes_masks(module):
        raise UserError(f"{config.method}: {encoders.no_patches(module)}")
    stages = [
        stage_of(config, method, encoder, normalised, size, begins, ends)
        for size, begins, ends in zip(config.sizes.pixels, [0, *borders], [*borders, steps], strict=True)
    ]
    if method.needs_labels and source.labels is None:
        raise UserError(f"{config.method} learns from classes, and {source.root} has no folder for each (or labels)")
    kept = {
        "source": images,
        "files_at_a_time": loaders.files_at_a_time(source, (state or {}).get("files_at_a_time")),
        "sized_for": sized_for,
        "steps": steps,
        "borders": borders,
        "normalised": normalised,
        "objects": [name for name, one in vars(objects).items() if one is not None],
        "precision": precision.chosen(config.precision, ranks.device, precision.kept(state, ranks.device)),
        "device": ranks.device.type,
    }
    config.given = given  # by whom it was made has no part in what was given
    method.mean, method.std = stages[-1].specs[0].mean, stages[-1].specs[0].std
    said = [one for one in (*said, told(stages)) if one]
    return Parts(config, weights, source, encoder, method, stages, defaults, steps, steps_per_epoch, kept, said)


def stage_of(
    config: Config,
    method: Method,
    encoder: Encoder,
    normalised: dict[str, list[float]],
    size: Size,
    begins: int,
    ends: int,
) -> Stage:
    """The views and masks of the steps from `begins` on to before `ends`, large views having `size` pixels."""
    specs = view_specs(config, method, encoder, normalised, size)
    masks = mask_specs(method.views, size, encoder.patch)
    if config.mask:  # the method has none of its own, as `combinations.check` has seen to
        masks = masks_of_run(specs, encoder.patch, config.mask, config.masking or "random")
    return Stage(begins, ends, specs, masks)


def is_complete(out: Path) -> bool:
    """Whether the encoder is that of the last checkpoint: a run that was made longer has an older one for a while."""
    encoder = out / ENCODER
    last = checkpoints.earlier(out, 0)
    return encoder.exists() and not (last.exists() and encoder.stat().st_mtime < last.stat().st_mtime)


def levelled(
    config: Config, objects: Objects, state: dict[str, Any] | None, sources: int = 1
) -> tuple[Levelled, list[str]]:
    """The images with what their values mean, and what there is to be told of it. A run keeps what it found first."""
    source = open_sources(config.data if objects.source is None else objects.source, sources)
    if state and "pixels" in state:
        return Levelled(source, Pixels.from_dict(state["pixels"]).levels), []
    found = survey(source, config.channels)
    levels = levels_of(config.channels, parsed_range(config.value_range), found)
    return Levelled(source, levels), describe(levels, found)


def given_or(value: Any, default: Any) -> Any:
    """What the user gave, or else the method's default."""
    return default if value is None else value


def unused_options(config: Config, objects: Objects) -> list[str]:
    """What to tell of options that say how a backbone is made, where the encoder is made already."""
    if objects.encoder is None:
        return []
    given = [
        f"{config.flag(option.name)} {getattr(config, option.name)}"
        for option in dataclasses.fields(config)
        if option.name in ("backbone", "stem", "patch_size") and getattr(config, option.name) != option.default
    ]
    return [f"{', '.join(given)}: not used, as the encoder is made already"] if given else []


def made_encoder(config: Config, objects: Objects, kind: type[Method] | Method, weights: Weights | None) -> nn.Module:
    """The user's own module, or the named backbone with the weights that it begins with."""
    if objects.encoder is not None:
        return objects.encoder
    module = create_backbone(config, kind)
    if weights is not None:
        starting.load_encoder(module, weights, config)
    return module


def create_backbone(config: Config, kind: type[Method] | Method) -> nn.Module:
    return backbones.create(
        config.backbone, config.size, stem=config.stem, patch=config.patch_size, pool=kind.pool,
        drop_path=config.drop_path or 0.0, channels=config.channels,
    )  # fmt: skip


def with_drop_path(config: Config, objects: Objects, kind: type[Method] | Method, defaults: Defaults) -> Config:
    """With the run's rate of stochastic depth: the user's, or the method's where the backbone takes one.

    Papers have it in transformers and ConvNeXts. An encoder with batch norms has none unless the user asks for it, as
    in DINO's and VICRegL's code for ResNets.

    Raises:
        UserError: for a rate that is asked for with an encoder that is made already.
    """
    if objects.encoder is not None and config.drop_path is not None:
        raise UserError(f"--drop-path {config.drop_path:g}: the encoder is made already, with a rate of its own")
    if objects.encoder is not None or config.drop_path is not None:
        return config
    if not defaults.drop_path:
        return replace(config, drop_path=0.0)
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            module = create_backbone(replace(config, drop_path=defaults.drop_path), kind)
    except UserError:
        return replace(config, drop_path=0.0)
    if encoders.has_batch_norm(module):
        return replace(config, drop_path=0.0)
    return replace(config, drop_path=defaults.drop_path_of(len(getattr(module, "blocks", ()))))


def with_layer_rates(config: Config, defaults: Defaults, module: nn.Module) -> Config:
    """With the run's layer-wise decay and factor on the patch embedding's rate: the user's, or the method's where the
    encoder has layers and a patch embedding."""
    layer_decay = defaults.layer_decay if optim.has_layers(module) else 1.0
    patch_embed_rate = defaults.patch_embed_rate if hasattr(module, "patch_embed") else 1.0
    return replace(
        config,
        layer_decay=given_or(config.layer_decay, layer_decay),
        patch_embed_rate=given_or(config.patch_embed_rate, patch_embed_rate),
    )


def left_out(config: Config, longer: Config) -> str:
    """In words, what the method has by itself in a longer run, and not in this one."""
    names = [name for name in BY_DEPTH if getattr(config, name) != getattr(longer, name)]
    given = " ".join(f"{config.flag(name)} {getattr(longer, name):g}" for name in names)
    return f"so short a run goes without {given}, which the method has from {SHORT:,} steps on" if names else ""


def view_specs(
    config: Config,
    kind: type[Method] | Method,
    module: nn.Module,
    normalised: dict[str, list[float]],
    size: Size,
) -> list[ViewSpec]:
    """One for each view of an image, as the method and the configuration want them.

    Args:
        normalised: mean and std where they aren't the recipe's; `--view` has the last word.
        size: pixels of the large views; how many views there are, and their blur, are as the last stage's.
    """
    views = views_of(kind, config.size, config.small_views, config.recipe, config.preset, config.large_views)
    patch = encoders.patch_size(module)
    blur = given_or(config.blur, shorter(config.size) > LARGEST_WITHOUT_BLUR)
    changes = {**normalised, **config.view}
    return views.specs(size, patch=patch, blur=blur, changes=changes, channels=config.channels)


def checked_encoder(
    config: Config,
    ranks: Ranks,
    kind: type[Method] | Method,
    module: nn.Module,
    source: Source,
    normalised: dict[str, list[float]],
) -> Encoder:
    """The module on its device as an `Encoder`, once it has embedded some of the run's images."""
    module = module.to(ranks.device)
    specs = view_specs(config, kind, module, normalised, config.size)
    order = loaders.Order(samples=len(source), batch=min(config.batch_size, 16), seed=config.seed, stop=1)
    crops = next(iter(loaders.LOADERS["torch"](source, specs, order, loaders.Budget())))
    channels_last = encoders.memory_format(module) == torch.channels_last
    images = finish(crops, specs, ranks.device, channels_last=channels_last).views[0]
    sizes = {}  # of views, and the option that each comes from
    for stage in reversed(config.sizes.pixels):
        for spec in view_specs(config, kind, module, normalised, stage):
            given = f"--image-size {config.image_size}" if spec.size == stage else "--small-views (0: none)"
            sizes.setdefault(spec.size, given)
    width = embedded(module, images, sizes)
    return encoders.wrap(module, width, mask_token=kind.mask_token).to(ranks.device)


def embedded(module: nn.Module, images: torch.Tensor, sizes: Mapping[Size, str]) -> int:
    """The width of a module's embeddings, once it has taken images of each size that the run has.

    Args:
        images: [B, C, H, W].
        sizes: pixels, those of the images first, -> the option of the run that asks for them.

    Raises:
        UserError: for a size that it can't take, or embeddings that nothing can be learned from.
    """
    widths = []
    for size, given in sizes.items():
        sides = height_and_width(size)
        sized = images if sides == images.shape[2:] else interpolate(images, sides, mode="bilinear", antialias=True)
        try:
            widths.append(encoders.measured_width(module, sized))
        except encoders.UnusableError as error:
            raise UserError(str(error)) from None
        except Exception as error:  # whatever a model may raise
            channels = images.shape[1]
            refused = f"{type(module).__name__}, can't take {sides[0]} x {sides[1]} images of {channels} channels"
            raise UserError(f"{given}: the encoder, a {refused}: {first_line(error)}") from error
        if widths[-1] != widths[0]:
            raise UserError(f"{given}: embeddings must be as wide at every size, got {widths[0]} and {widths[-1]}")
    return widths[0]


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
        image_size=config.size,
        image_sizes=config.sizes.pixels if len(config.sizes.pixels) > 1 else (),
        channels=config.channels,
        patch=encoder.patch,
        prefix_tokens=encoder.prefix_tokens,
        batch_norm=encoders.has_batch_norm(encoder),
        group=ranks.group,
    )


def create_method(kind: type[Method], width: int, run: RunFacts, config: Config) -> Method:
    """The method with the user's options; UserError for one that there isn't, or a value that it can't have."""
    options = options_of(kind)
    given = {**preset_of(kind, config.preset).options, **config.options}
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
    wanted = replace(
        run,
        large_views=config.large_views or 0,
        projector=projector_widths(config.projector),
        momentum_encoder=config.momentum_encoder,
    )
    try:
        return kind(width, wanted, **given)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


__all__ = ["ENCODER", "MakeOptimizer", "Objects", "Parts", "create_method", "given_or", "prepare"]
