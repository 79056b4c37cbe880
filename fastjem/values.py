"""The values that a run trains with, whoever chose them, and how they are kept beside those that somebody gave."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastjem import yaml_text
from fastjem.build import Training
from fastjem.config import Config
from fastjem.data import loaders
from fastjem.data.pixels import Pixels
from fastjem.data.sources import naming
from fastjem.methods import options_of, views_of
from fastjem.prepare import given_or


def of(training: Training) -> dict[str, Any]:
    """Everything that a configuration may leave to the method, the recipe, the data or the machine, as it is in this
    run; names are the configuration's where it has one. It is `ran` in `config.yaml`, the hyper-parameters of trackers,
    and what the report shows. A value is None where the run has nothing of that kind.

    `learning_rate` is for 256 images, as it is given; `peak_learning_rate` is what the optimiser has after the warm-up.
    """
    config, step, schedule = training.config, training.step, training.schedule
    method = step.method
    last = training.stages[-1]
    views = views_of(method, config.size, config.small_views, config.recipe, config.preset, config.large_views)
    masks = views.mask or config.mask or 0
    loader = training.loader.loader if isinstance(training.loader, loaders.Staged) else training.loader
    momentum = bool(step.teacher)
    return {
        "method": config.method,
        "preset": config.preset,
        "encoder": _name_of_encoder(training),
        "parameters": count(step.encoder.backbone),
        "parameters_of_heads": count(method),
        "embedding_width": step.encoder.width,
        "images": len(training.source),
        "classes": len(training.source.classes),
        "steps": training.steps,
        "steps_per_epoch": training.steps_per_epoch,
        "epochs": _short(training.steps / training.steps_per_epoch),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "ranks": training.ranks.size,
        "shard": config.shard and training.ranks.size > 1,
        "activation_checkpointing": config.activation_checkpointing,
        "optimizer": name_of_optimizer(training),
        "learning_rate": training.rate,
        "peak_learning_rate": schedule.learning_rate,
        "warmup_epochs": _short(schedule.warmup / training.steps_per_epoch),
        "warmup_steps": schedule.warmup,
        "weight_decay": schedule.weight_decay,
        "final_weight_decay": schedule.final_weight_decay,
        "clip": training.clip or None,
        "momentum_encoder": momentum,
        "momentum": schedule.momentum if momentum else None,
        "final_momentum": schedule.final_momentum if momentum else None,
        "layer_decay": config.layer_decay,
        "patch_embed_rate": config.patch_embed_rate,
        "drop_path": config.drop_path,
        "large_views": views.large,
        "small_views": views.small,
        "recipe": views.recipe,
        "views": [dataclasses.asdict(spec) for spec in dict.fromkeys(last.specs)],
        "mask": masks or None,
        "masking": None if not masks else views.masking if views.mask else config.masking or "random",
        "options": _options(training),
        "precision": training.precision,
        "device": training.ranks.device.type,
        "loader": type(loader).__module__.rpartition(".")[2] if config.loader == "auto" else config.loader,
        "workers": config.workers if config.workers >= 0 else training.ranks.cores,
        "seed": config.seed,
    }


def _short(number: float) -> float:
    """With three decimals; a whole number as one."""
    return int(number) if number == int(number) else round(number, 3)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _name_of_encoder(training: Training) -> str:
    own = "encoder" in training.facts["objects"]
    return type(training.step.encoder.backbone).__name__ if own else training.config.backbone


def name_of_optimizer(training: Training) -> str:
    if "optimizer" in training.facts["objects"]:
        return type(training.optimizer).__name__
    return given_or(training.config.optimizer, training.defaults.optimizer)


def _options(training: Training) -> dict[str, Any]:
    """The method's own options; of a method that was made already, nobody knows them."""
    method = training.step.method
    if "method" in training.facts["objects"] and not training.config.options:
        return {}
    return {**options_of(type(method)), **training.config.options}


def text(config: Config, pixels: Pixels, pool: str | None, ran: Mapping[str, Any]) -> str:
    """What `config.yaml` holds: what ran, what was given, and the configuration, by which a run is gone on with;
    with it how pixels become numbers in this run, and how tokens become an embedding.

    `data_at` is where a relative `data` leads to from here: a run may be gone on with from another folder.

    Args:
        ran: as `of` has it.
    """
    values = dataclasses.asdict(config)
    given = {name: value for name, value in values.items() if name in config.given - {"resume", "new_data"}}
    kept = {**values, "pixels": pixels.to_dict(), "pool": pool}
    if config.data is not None:
        kept["data_at"] = naming.absolute(config.data)
    parts = {
        "What this run trains with, whoever chose it.": {"ran": ran},
        "What whoever began the run, or went on with it, chose.": {"given": given},
        "What --resume reads; null: the method's own.": kept,
    }
    return "\n".join(f"# {about}\n{yaml_text.dumped(_plain(part))}" for about, part in parts.items())


def _plain(value: Any) -> Any:
    """The same in lists and mappings alone."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


__all__ = ["count", "name_of_optimizer", "of", "text"]
