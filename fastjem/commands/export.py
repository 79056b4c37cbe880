"""`fastjem export`: the encoder alone, in a folder that timm opens, or as one safetensors file, and as ONNX on request.

All of them say in their metadata how the encoder takes pixels: `fastjem.data.pixels.Pixels.from_metadata` reads it.
"""

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fastjem import checkpoints, encoders, exports, fields, hub, portable, reading
from fastjem.checkpoints import write_atomically
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
from fastjem.errors import UserError
from fastjem.printing import say
from fastjem.runs import Opened, open_run

OTHER_FILES = (".pt", ".pth", ".bin", ".ckpt", ".onnx")  # nobody means a folder by these


@dataclass
class ExportOptions:
    """Write a run's encoder, without its heads, as a folder that timm opens; from a run that was killed, too."""

    run: str = field(
        metadata={"help": "run folder; an export, to be written again or sent", "positional": True, "path": True}
    )
    out: str | None = field(
        default=None,
        metadata={
            "help": "folder to write, or a file that ends in .safetensors; none: export, or export-teacher, in the "
            "run's folder",
            "path": True,
        },
    )
    teacher: bool = field(default=False, metadata={"help": "the run's momentum encoder, not the trained one"})
    onnx: bool = field(default=False, metadata={"help": "an ONNX file with it, checked against the encoder"})
    push: str | None = field(
        default=None, metadata={"help": "USER/MODEL on the Hugging Face hub, which gets the folder, too"}
    )
    private: bool = field(default=False, metadata={"help": "--push makes a model that its owner alone sees"})
    license: str | None = field(
        default=None, metadata={"help": "of the weights, for the model card, as the hub names it: apache-2.0, say"}
    )


@dataclass(frozen=True)
class Written:
    """What `write` left: files, one line of code that opens them, and the address of what was sent."""

    files: list[Path]
    opens: str
    address: str | None = None


def export(options: ExportOptions, *, encoder: nn.Module | None = None) -> list[Path]:
    """The files written: of a folder `model.safetensors`, `config.json`, `README.md` (a model card), and `model.onnx`
    where that is asked for; or one .safetensors, with an .onnx beside it. Metadata and `config.json` say how images
    become numbers, and `"teacher": "true"` where the weights are a momentum encoder's. What timm can't open is said
    before it is written, and `fastjem.load_encoder` opens it.

    Args:
        options: as the command line takes them.
        encoder: the module that the run was begun with in place of a backbone's name: the export then holds its weights
            and how its images become numbers, and whoever opens it needs the module, too.

    Raises:
        UserError: for what is no run, a run without a momentum encoder where that is asked for, what can't be written,
            and a hub that can't be reached or doesn't know who we are; then before anything is written.
    """
    return write(options, encoder=encoder).files


def write(options: ExportOptions, *, encoder: nn.Module | None = None) -> Written:
    """`export`, with what there is to be said of it."""
    fields.conform(options, "export: {}".format)
    out = place_of(options)
    _check(options, out)
    opened = open_run(options.run, teacher=options.teacher, encoder=encoder)
    given = ", encoder=module" if "backbone" not in opened.metadata else ""
    if is_file(out):
        files = _write_file(opened, out, onnx=options.onnx)
        return Written(files, f'fastjem.load_encoder("{out}"{given})')
    hub_place = f"hf-hub:{options.push}" if options.push else None

    def onnx(path: Path) -> None:
        to_onnx(opened.encoder, opened.pixels, path, opened.metadata)

    folder = portable.write(
        opened, out, place=hub_place, license=options.license, onnx=onnx if options.onnx else None
    )  # fmt: skip
    address = None
    if options.push:
        address = hub.send(out, options.push, private=options.private, files=[path.name for path in folder.files])
    opens = f'fastjem.load_encoder("{hub_place or out}"{given})'
    if not folder.refused:
        opens = f'timm.create_model("{hub_place or f"local-dir:{out}"}", pretrained=True)'
    return Written(folder.files, opens, address)


def is_file(out: Path) -> bool:
    """Whether one file is meant, and no folder."""
    return out.suffix == ".safetensors"


def place_of(options: ExportOptions) -> Path:
    """What is written: what `--out` says, else a folder in the run's, named by the checkpoint where that is named, one
    beside a file, or an exported folder itself.

    Raises:
        UserError: for weights on the hub, beside which there is nothing.
    """
    if options.out is not None:
        return Path(options.out)
    run = Path(options.run)
    if hub.is_there(options.run):
        raise UserError(f"export: {options.run} is on the hub; --out names the folder to write")
    if (of_checkpoint := checkpoints.run_of(run)) is not None:
        return of_checkpoint / f"export-{run.stem}{'-teacher' if options.teacher else ''}"
    if run.is_dir() and exports.is_exported(run):
        return run
    if run.is_dir():
        return run / ("export-teacher" if options.teacher else "export")
    return run.with_suffix("")


def _check(options: ExportOptions, out: Path) -> None:
    """UserError for options that don't go together, and a place that can't be written or a hub that isn't there."""
    if options.private and not options.push:
        raise UserError("--private is for --push")
    if is_file(out):
        for name in ("push", "license"):
            if getattr(options, name):
                raise UserError(f"--{name} is for a folder, and --out {out} is a file's name")
        return
    if out.suffix in OTHER_FILES:
        raise UserError(f"--out must name a folder, or a file that ends in .safetensors, got {out}")
    if options.license is not None and not re.fullmatch(r"[\w.+-]+", options.license):
        raise UserError(f"--license must be a name as the hub has it (apache-2.0, mit, other), got {options.license!r}")
    portable.check(out)
    if options.push:
        hub.check(options.push)


def _write_file(opened: Opened, out: Path, *, onnx: bool) -> list[Path]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        encoders.save(opened.encoder, str(out), opened.metadata)
    except OSError as error:
        raise UserError(f"--out {out}: {reading.why_not(error)}") from None
    written = [out]
    if onnx:
        written.append(out.with_suffix(".onnx"))
        to_onnx(opened.encoder, opened.pixels, written[-1], opened.metadata)
    return written


def to_onnx(
    encoder: nn.Module, pixels: Pixels, path: Path, metadata: Mapping[str, str], tolerance: float = 1e-3
) -> float:
    """[B, C, H, W] float32 `images` -> [B, D] `features`, any B.

    Args:
        pixels: how many channels and pixels the images have.
        metadata: text by name, written into the file.

    Returns:
        The largest difference between onnxruntime's values and the encoder's, as a share of the largest value.

    Raises:
        UserError: where a package is missing, the file can't be written, or onnxruntime's values differ from the
            encoder's by more than tolerance: then there is no file.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--onnx: {error.name} is not installed; pip install 'fastjem[onnx]'") from None
    shape = (pixels.channels, *height_and_width(pixels.size))
    encoder = encoder.cpu().eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        program = torch.onnx.export(
            encoder, (torch.randn(2, *shape),), input_names=["images"], output_names=["features"], dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
        assert program is not None  # torch.onnx.export has given it since dynamo=True
        program.model.metadata_props.update(metadata)
        graph = program.model_proto.SerializeToString()
    images = torch.randn(3, *shape)  # another batch size than the graph was traced with
    with torch.no_grad():
        truth = encoder(images)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    values = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    difference = float((values - truth).abs().max() / truth.abs().max())
    if not difference <= tolerance:  # NaN isn't
        raise UserError(f"--onnx: onnxruntime's values differ from the encoder's by {difference:.1e} of the largest")
    try:
        write_atomically(path, graph)
    except OSError as error:
        raise UserError(f"--onnx: {path} could not be written: {reading.why_not(error)}") from None
    return difference


def main(options: ExportOptions) -> int:
    written = write(options)
    for path in written.files:
        say(path, sys.stdout)
    if written.address:
        say(written.address, sys.stdout)
    say(f"fastjem: {written.opens} opens it")
    return 0
