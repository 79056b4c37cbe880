"""The file of a run's folder that has its configuration."""

import dataclasses
from pathlib import Path
from typing import Any

from fastjem import backbones, fields, reading, yaml_text
from fastjem.config.checks import check_choices, check_numbers
from fastjem.config.options import Config
from fastjem.data.pixels import Pixels
from fastjem.data.size import written
from fastjem.data.sources import naming
from fastjem.errors import UserError

FILE = "config.yaml"
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
        check_numbers(config)
        check_choices(config)
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
