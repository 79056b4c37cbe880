"""`fastjem export`: the encoder alone, as safetensors, and as ONNX on request.

Both files say in their metadata how the encoder takes pixels: `fastjem.data.pixels.Pixels.from_metadata` reads it.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fastjem import encoders, fields, reading
from fastjem.checkpoints import write_atomically
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
from fastjem.errors import UserError
from fastjem.printing import say
from fastjem.runs import open_run


@dataclass
class ExportOptions:
    """Write a run's encoder without projector and predictor; from a run that was killed too."""

    run: str = field(metadata={"help": "run folder", "positional": True, "path": True})
    out: str = field(default="encoder.safetensors", metadata={"help": "file to write", "path": True})
    teacher: bool = field(default=False, metadata={"help": "the run's momentum encoder, not the trained one"})
    onnx: bool = field(default=False, metadata={"help": "an .onnx file beside it, checked against the encoder"})


def export(options: ExportOptions, *, encoder: nn.Module | None = None) -> list[Path]:
    """The files written; their metadata say `"teacher": "true"` where they hold a momentum encoder.

    Args:
        options: as the command line takes them.
        encoder: the module that the run was begun with in place of a backbone's name: the file then holds its weights
            and how its images become numbers, and whoever opens it needs the module, too.

    Raises:
        UserError: for what is no run, a run without a momentum encoder where that is asked for, and what can't be
            written.
    """
    fields.conform(options, "export: {}".format)
    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {out}")
    opened = open_run(options.run, teacher=options.teacher, encoder=encoder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        encoders.save(opened.encoder, str(out), opened.metadata)
    except OSError as error:
        raise UserError(f"--out {out}: {reading.why_not(error)}") from None
    written = [out]
    if options.onnx:
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
    with contextlib.redirect_stdout(io.StringIO()):
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
    for path in export(options):
        say(path, sys.stdout)
    return 0
