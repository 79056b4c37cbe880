"""What a new run starts from: weights that are given, and what of them stays as it is."""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from fastjem import backbones, encoders, exports
from fastjem.config import Config
from fastjem.data import statistics
from fastjem.data.source import Source
from fastjem.errors import UserError, nearest
from fastjem.given import Weights, names_a_place, open_weights
from fastjem.nn.sample_memory import SampleMemory


def with_weights_of_backbone(config: Config) -> Config:
    """`--backbone NAME.TAG` and `--backbone PLACE:...` mean what they mean to timm: that model with its weights.

    Raises:
        UserError: for a tag that there isn't, or weights that are named twice.
    """
    name = config.backbone
    at_a_place = names_a_place(name)
    if not at_a_place and ("." not in name or not backbones.tag_of(name)):
        return config
    if config.weights is not None:
        raise UserError(f"--backbone {name} names weights already, and --weights {config.weights} others")
    if at_a_place:
        changed = config.with_values(weights=name)
        changed.given = (config.given | {"weights"}) - {"backbone"}  # the weights say which architecture is theirs
    else:
        changed = config.with_values(weights=f"timm/{name}", backbone=backbones.architecture(name))
        changed.given = config.given | {"weights"}
    return changed


def opened(config: Config) -> Weights | None:
    """The weights that the configuration names, with all that belongs to them.

    Raises:
        UserError: for weights that can't be had, or what isn't there of them.
    """
    if config.weights is None:
        return None
    weights = open_weights(config.weights, teacher=config.weights_of == "teacher")
    if config.weights_of == "all":
        if weights.config is None:
            raise UserError(f"--weights-of all: {config.weights} is no run's folder, which alone has heads")
        if weights.config.method != config.method:
            whose = f"the run in {config.weights} was {weights.config.method}'s"
            raise UserError(
                f"--weights-of all: {whose}, whose heads {config.method} can't go on with; --weights-of encoder takes "
                "the encoder alone"
            )
    return weights


POSITIONS = "pos_embed"  # of the patches, learned, in timm's transformers
LAST_NORMS = {"norm": "fc_norm", "fc_norm": "norm"}  # of timm's transformers: of tokens, and of what is pooled of them


def taken_over(config: Config, weights: Weights, *, made: bool = False, replaced: Collection[str] = ()) -> Config:
    """The configuration with what the weights say and the user doesn't: the architecture, its stem and patches; from
    one of ours also the image size and the channels, and with all of a run the method's options, too, but for those
    that are `replaced`, and where the method is `made` already.

    Raises:
        UserError: for images of another number of channels.
    """
    found: dict[str, Any] = {"backbone": weights.backbone}
    given = config.backbone if "backbone" in config.given else weights.backbone
    if backbones.full_name(given) == backbones.full_name(weights.backbone):
        stem = "small" if backbones.has_small_stem(weights.module) else "standard"
        found |= {"stem": stem, "patch_size": _patch_size(weights)}
    if weights.pixels is not None:
        found |= {"image_size": weights.pixels.size, "channels": weights.pixels.channels}
    run = weights.config if config.weights_of == "all" else None
    if run is not None:
        names = ("preset", "momentum_encoder", *(() if made else ("projector", "large_views")))
        found |= {name: getattr(run, name) for name in names}
    values = {name: value for name, value in found.items() if name not in config.given}
    if run is not None:
        kept = {name: value for name, value in run.options.items() if name not in replaced}
        values["options"] = {**kept, **config.options}
    config = config.with_values(**values)
    if len(weights.mean) != config.channels:
        channels = f"images of {len(weights.mean)} channels, and --channels is {config.channels}"
        raise UserError(f"--weights {config.weights}: they are for {channels}")
    return config


def _patch_size(weights: Weights) -> int:
    """What `--patch-size` has to be for these weights; 0: the architecture's own patches and positions are meant."""
    size = encoders.patch_size(weights.module)
    if not backbones.takes_patch_size(backbones.full_name(weights.backbone)):
        return 0
    if weights.built is not None:  # one of ours; a short name's patches follow the image size
        return weights.built.patch_size or (size if backbones.full_name(weights.backbone) != weights.backbone else 0)
    as_it_is = shapes_of(backbones.outline(weights.backbone).state_dict()) == shapes_of(weights.module.state_dict())
    return 0 if as_it_is else size


def normalisation(
    config: Config, source: Source, weights: Weights | None, state: Mapping[str, Any] | None
) -> tuple[dict[str, list[float]], str]:
    """Fields of the views, how images are normalised where that isn't as the recipe says, and what is to be told of it:
    by what the user gives, else by what is measured if they ask for it, else as the weights' images. A resumed run
    keeps what its `state` has.

    Raises:
        UserError: as `statistics.measured` does.
    """
    if state:
        return state.get("normalised", {}), ""
    found = {} if weights is None else {"mean": list(weights.mean), "std": list(weights.std)}
    said = ""
    if config.statistics == "measure":
        mean, std, images = statistics.measured(source)
        found = {"mean": mean, "std": std}
        numbers = " and ".join(",".join(f"{x:.3f}" for x in values) for values in (mean, std))
        said = f"normalised by mean and deviation of {images} of the images, {numbers}"
    for name in ("mean", "std"):
        given = statistics.parsed(config.flag(name), getattr(config, name), config.channels)
        if given is not None:
            found[name] = given
    return found, said


def load_encoder(module: nn.Module, weights: Weights, config: Config) -> None:
    """Load the weights into a module that was made as the configuration says.

    Positions and patches of another size are resampled as timm does it for its own weights.

    Raises:
        UserError: for another architecture; it names both.
    """
    state = fitted(module, weights.module.state_dict(), grid_of_positions(weights.module))
    are = f"--weights {config.weights}: they are a {weights.backbone}'s"
    exports.compare(module, shapes_of(state), f"{are}, and the encoder is a {config.backbone}")
    module.load_state_dict(state)


def fitted(module: nn.Module, state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The weights for a module, by timm's own filter of that model's checkpoints where shapes differ.

    What differs by how tokens are pooled is fitted first: the last norm is the same one before the pooling and behind
    it, and of attention that pools nothing is left where tokens are averaged.

    grid: rows and columns of the patches that the state's positions are of; None: timm's filter finds them.
    """
    state = with_positions(module, state, grid)
    expected = shapes_of(module.state_dict())
    found = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        moved = f"{LAST_NORMS.get(part)}.{rest}"
        if name not in expected and moved in expected and moved not in state:
            found[moved] = value
        elif name in expected or part != "attn_pool":
            found[name] = value
    if shapes_of(found) == expected or found.keys() != expected.keys():
        return found
    resample: Callable[..., dict[str, Tensor]] | None = None
    for kind in type(module).__mro__:
        resample = resample or getattr(sys.modules.get(kind.__module__), "checkpoint_filter_fn", None)
    if resample is None:
        return found
    # Positions that have their shape already aren't given to timm, which may take them for those of another grid.
    done = {name: value for name, value in found.items() if name == POSITIONS and value.shape == expected[name]}
    rest = {name: value for name, value in found.items() if name not in done}
    return {**resample(rest, module), **done}


def grid_of_positions(module: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of the patches that a transformer's learned positions are of; None: it has none."""
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    return None if grid is None or getattr(module, POSITIONS, None) is None else (int(grid[0]), int(grid[1]))


def with_positions(module: nn.Module, state: Mapping[str, Tensor], grid: tuple[int, int] | None) -> dict[str, Tensor]:
    """A state whose positions, of a grid, are resampled as timm does it to the module's, where one of them isn't a
    square: how many there are doesn't tell a grid's shape."""
    wanted = grid_of_positions(module)
    positions = state.get(POSITIONS)
    if grid is None or wanted is None or positions is None or grid == wanted:
        return dict(state)
    if grid[0] == grid[1] and wanted[0] == wanted[1]:
        return dict(state)
    import timm.layers

    resample: Any = timm.layers.resample_abs_pos_embed
    prefix = positions.shape[1] - grid[0] * grid[1]
    return {**state, POSITIONS: resample(positions, list(wanted), list(grid), num_prefix_tokens=prefix)}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_all(step: nn.Module, weights: Weights, config: Config, images: int) -> None:
    """Load heads and momentum copies of a run into the modules of another one, whose encoder has its weights already.

    images: in the data; what a method keeps of each image goes along with these images alone.

    Raises:
        UserError: where they don't fit.
    """
    assert weights.state is not None  # as `opened` has looked
    given: Mapping[str, Tensor] = weights.state["model"]
    here = step.state_dict()
    state = {name: tensor for name, tensor in given.items() if ".backbone." not in name}
    state |= {name: tensor for name, tensor in here.items() if name.startswith("encoder.backbone.")}
    prefix = "teacher.encoder.backbone."
    if any(name.startswith(prefix) for name in here):
        whole = exports.below(prefix, given)
        copy = fitted(step.get_submodule(prefix.rstrip(".")), whole, grid_of_positions(weights.module))
        state |= {f"{prefix}{name}": tensor for name, tensor in copy.items()}
    kept = [part.images for part in step.modules() if isinstance(part, SampleMemory)]
    if any(count != images for count in kept):
        raise UserError(
            f"--weights-of all: {config.method} keeps a row of each image of its data, {kept[0]} in the run in "
            f"{config.weights} and {images} here; --weights-of encoder takes the encoder alone"
        )
    if not any(name.startswith("teacher.") for name in here):  # --no-momentum-encoder
        state = {name: tensor for name, tensor in state.items() if not name.startswith("teacher.")}
    exports.compare(step, shapes_of(state), f"--weights-of all: {config.weights} doesn't fit this run")
    step.load_state_dict(state)


def sized_for(config: Config, weights: Weights) -> dict[str, int]:
    """The numbers by which heads have their sizes, where those of a run are taken; empty where they are made anew."""
    return (weights.state or {}).get("sized_for", {}) if config.weights_of == "all" else {}


def told(config: Config, weights: Weights) -> str:
    """In words: what the run starts from, and what of it is left behind."""
    if weights.config is None or weights.state is None:
        return f"the encoder begins with the weights of {config.weights}"
    whose = f"{weights.config.method}, step {weights.state['step']}"
    if config.weights_of == "all":
        return f"encoder, heads and momentum copies begin as those of {config.weights} ({whose})"
    which = "momentum encoder" if config.weights_of == "teacher" else "encoder"
    takes = "; --weights-of all takes them along" if weights.config.method == config.method else ""
    return f"the encoder begins as the {which} of {config.weights} ({whose}), whose heads stay behind{takes}"


def freeze(module: nn.Module, names: str) -> None:
    """Parameters that aren't trained: their names, or those of the parts that they are in, "patch_embed,blocks.0".

    Raises:
        UserError: for a name that isn't there.
    """
    for name in filter(None, (part.strip() for part in names.split(","))):
        concerned = [p for full, p in module.named_parameters() if full == name or full.startswith(f"{name}.")]
        if not concerned:
            parts = [part for part, _ in module.named_modules() if part]
            raise nearest(f"part of the {type(module).__name__} for --freeze,", name, parts)
        for parameter in concerned:
            parameter.requires_grad_(False)
