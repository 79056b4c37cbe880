"""The model card of an exported encoder: where it comes from, its figures, and how it is opened and given images."""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastjem import __version__, exports, reading
from fastjem.data.levels import KINDS, RGB
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
from fastjem.errors import UserError
from fastjem.printing import printable, say
from fastjem.runs import Opened

FIGURES = ("knn", "linear_probe", "rankme", "dimensions")
PROTOCOL = ("train_images", "test_images", "classes", "held_out", "k")
VERSIONS = ("fastjem", "torch", "timm")


def facts(opened: Opened) -> dict[str, Any]:
    """What is told of an encoder beside its metadata: of a run, how it was trained and what `evaluate` found of just
    these weights; of an exported folder, what it says itself. Folders are named without what leads to them.
    """
    told: dict[str, Any] = {}
    if opened.config is not None:
        config = opened.config
        names = ("method", "preset", "batch_size", "accumulate", "seed")
        told = {name: getattr(config, name) for name in names}
        told |= {"data": _named(config.data), "step": opened.step}
        environment = _object(opened, "environment.json")
        told |= {name: environment[name] for name in ("images", "steps_per_epoch") if name in environment}
        told["versions"] = {name: environment[name] for name in VERSIONS if name in environment}
    elif opened.path.is_dir():
        told = (exports.of_folder(opened.path) or {}).get("run") or {}
    found = _object(opened, "evaluation-teacher.json" if opened.teacher else "evaluation.json")
    if found.get("step") == opened.step and found.get("teacher") == opened.teacher:
        with contextlib.suppress(KeyError, TypeError):  # somebody else's file
            row = found["features"]["encoder"]
            names = {"train": _named(found["train"]), "test": _named(found["test"])}
            told["evaluation"] = {**names, **{n: found[n] for n in PROTOCOL}, **{n: float(row[n]) for n in FIGURES}}
    return told


def _object(opened: Opened, name: str) -> dict[str, Any]:
    """A file beside the encoder; empty where there is none, and where it is damaged, which is said."""
    try:
        return reading.json_object(opened.folder / name)
    except reading.Missing:
        return {}
    except UserError as error:
        say(f"fastjem: left out of the model card: {error}")
        return {}


def _named(data: str | None) -> str:
    """ "/home/me/photos,s3://bucket/b.tar?key=1" -> "photos, b.tar": no path and no key leaves the machine."""
    if data is None:
        return "the embedded data set"
    return ", ".join(os.path.basename(part.partition("?")[0].rstrip("/\\")) or part for part in data.split(","))


@dataclass(frozen=True)
class Card:
    """What a model card says; `text` is it.

    Args:
        told: see `facts`.
        backbone: the architecture's name.
        place: the folder's name, or "hf-hub:USER/MODEL".
        refused: why timm doesn't open the folder; empty: it does.
        torchvision: the model of torchvision's that takes the weights; empty: there is none.
        small_stem: whether that model's stem has to be replaced first.
    """

    told: Mapping[str, Any]
    pixels: Pixels
    backbone: str
    width: int | None
    parameters: int
    place: str
    teacher: bool = False
    refused: str = ""
    torchvision: str = ""
    small_stem: bool = False
    own_module: bool = False
    onnx: bool = False
    license: str | None = None

    @property
    def on_hub(self) -> bool:
        return self.place.startswith("hf-hub:")

    @property
    def plain(self) -> bool:
        """Whether images are pictures of 8 bits in colour, as Pillow reads them."""
        return self.pixels.channels == RGB and self.pixels.values == "8-bit"

    def text(self) -> str:
        method = self.told.get("method")
        trained = f" by {_code(method)}" if method else ""
        title = f"# {printable(self.backbone)}, pretrained{' with ' + printable(method) if method else ''}"
        opening = (
            f"An image encoder, {_code(self.backbone)}, trained by joint embedding{trained} with fastjem: images in, "
        )
        opening += f"embeddings of {self.width} numbers out." if self.width else "embeddings out."
        parts = [self._front(), title, opening, self._table(), self._figures(), "## Images", self._images()]
        parts += ["## With timm", self._timm(), "## With fastjem", self._fastjem()]
        if self.torchvision:
            parts += ["## With torchvision", self._torchvision()]
        if self.onnx:
            parts += ["## With ONNX", self._onnx()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front(self) -> str:
        """YAML, as the hub reads it."""
        method = self.told.get("method", "")
        tags = ["image-feature-extraction", "self-supervised-learning", "fastjem"]
        tags += [] if self.refused else ["timm"]
        tags += [method] if re.fullmatch(r"\w+", method) else []
        lines = [f"library_name: {'fastjem' if self.refused else 'timm'}", "pipeline_tag: image-feature-extraction"]
        lines += [f"license: {self.license}"] if self.license else []
        return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])

    def _table(self) -> str:
        told = self.told
        images = f"{told['images']:,} images" if isinstance(told.get("images"), int) else ""
        step, per_epoch = told.get("step"), told.get("steps_per_epoch")
        epochs = f"{step / per_epoch:.4g}" if isinstance(step, int) and isinstance(per_epoch, int) else ""
        batch = told.get("batch_size")
        if batch and told.get("accumulate", 1) > 1:
            batch = f"{batch} x {told['accumulate']}"
        versions = ", ".join(f"{name} {version}" for name, version in (told.get("versions") or {}).items())
        rows = {
            "architecture": _code(self.backbone),
            "method": _code(told["method"]) if told.get("method") else "",
            "preset": told.get("preset"),
            "weights": "the momentum encoder (teacher)" if self.teacher else "the trained encoder",
            "parameters": f"{self.parameters:,}",
            "images": f"{self.pixels.channels} x {' x '.join(map(str, height_and_width(self.pixels.size)))} pixels",
            "trained on": ", ".join(filter(None, (_code(told["data"]) if told.get("data") else "", images))),
            "steps": f"{step:,}" if isinstance(step, int) else "",
            "epochs": epochs,
            "batch": batch,
            "seed": str(told.get("seed", "")),
            "trained with": versions,
            "exported with": f"fastjem {__version__}",
        }
        lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
        return "\n".join(["| | |", "|---|---|", *lines])

    def _figures(self) -> str:
        found = self.told.get("evaluation")
        if not found:
            return ""
        asked = "each tenth image held out" if found["held_out"] else _code(found["test"])
        header = f"| kNN, k = {found['k']} | linear probe | RankMe |"
        row = (
            f"| {found['knn']:.1%} | {found['linear_probe']:.1%} | {found['rankme']:.1f} of {found['dimensions']:.0f} |"
        )
        known = f"{found['train_images']:,} images of {_code(found['train'])}"
        how = f"{found['test_images']:,} images of {found['classes']} classes ({asked}) by {known} with their labels:"
        return "\n".join(["## Figures", "", f"Of `fastjem evaluate`, {how}", "", header, "|---|---|---|", row])

    def _images(self) -> str:
        pixels = self.pixels
        high, wide = height_and_width(pixels.size)
        size = f"its shorter side has {high} pixels" if high == wide else f"it covers {high} x {wide} (height x width)"
        black, white = (f"{value:.10g}" for value in pixels.value_range)
        mean, std = (f"{[round(x, 6) for x in numbers]}" for numbers in (pixels.mean, pixels.std))
        said = (
            f"An image is turned as its EXIF says and resized ({pixels.interpolation}, antialiased) so that {size}; of "
        )
        said += f"that the middle {high} x {wide} is taken. Values are scaled from {black} (black) to {white} (white) "
        said += f"onto 0 to 1 and normalised by mean {mean} and standard deviation {std}"
        if pixels.channels != RGB:
            said += f", one of each of the {pixels.channels} channels"
        if pixels.values == "8-bit" and pixels.value_range != KINDS["8-bit"]:
            said += ". `config.json` has both for values of 0 to 255, as timm takes them; it clips none"
        return f"{said}."

    def _timm(self) -> str:
        if self.refused:
            return f"timm doesn't open these weights: {printable(self.refused)}."
        place = self.place if self.on_hub else f"local-dir:{self.place}"
        return _python(
            f"import timm\nimport torch\n{self._reading()}",
            f'model = timm.create_model("{place}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            f"{self._read()}\n"
            f"with torch.no_grad():\n    embedding = model(transform(image)[None])  # [1, {self.width}]",
        )

    def _reading(self) -> str:
        return "from PIL import Image, ImageOps" if self.plain else "import numpy as np\nfrom PIL import Image"

    def _read(self) -> str:
        """Lines that make `image` of a file, for timm's and torchvision's transforms."""
        if self.plain:
            return 'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")'
        pixels = self.pixels
        black, white = (0, 255) if pixels.values == "8-bit" else pixels.value_range
        scaled = f"values / {white:.10g}" if black == 0 else f"(values - {black:.10g}) / {white - black:.10g}"
        array = 'np.asarray(Image.open("image.png"), np.float32)'
        order = "[None]" if pixels.channels == 1 else ".permute(2, 0, 1)"
        shape = f"[{pixels.channels}, H, W]"
        return f"values = torch.from_numpy({array}.copy()){order}  # {shape}\nimage = ({scaled}).clip(0, 1)"

    def _fastjem(self) -> str:
        own = ", encoder=module" if self.own_module else ""
        file = "photo.jpg" if self.plain else "image.png"
        code = _python(
            "import fastjem\nimport torch",
            f'encoder = fastjem.load_encoder("{self.place}"{own})\nwith torch.no_grad():\n'
            f'    embeddings = encoder(encoder.prepare(["{file}"]))',
        )
        if not self.own_module:
            return code
        return (
            f"The weights are those of a module of its owner's, {_code(self.backbone)}, which is given again.\n\n{code}"
        )

    def _torchvision(self) -> str:
        high, wide = height_and_width(self.pixels.size)
        mean, std = ([round(x, 6) for x in numbers] for numbers in (self.pixels.mean, self.pixels.std))
        lines = [f"model = torchvision.models.{self.torchvision}()", "model.fc = torch.nn.Identity()"]
        if self.small_stem:
            lines += ["model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the stem for small images"]
            lines += ["model.maxpool = torch.nn.Identity()"]
        lines += ["model.load_state_dict(load_file(file))", "model.eval()"]
        imports = "import torch\nimport torchvision\n"
        where = f'file = "{self.place}/model.safetensors"'
        if self.on_hub:
            imports += "from huggingface_hub import hf_hub_download\n"
            where = f'file = hf_hub_download("{self.place.removeprefix("hf-hub:")}", "model.safetensors")'
        code = [f"{imports}from safetensors.torch import load_file\nfrom torchvision import transforms as T", where]
        code += ["\n".join(lines)]
        if high == wide:
            resize = f"T.Resize({high}), T.CenterCrop({high}), T.ToTensor(), T.Normalize({mean}, {std})"
            code += [f"transform = T.Compose([{resize}])"]
        return _python(*code)

    def _onnx(self) -> str:
        file = f'"{self.place}/model.onnx"'
        imports = "import onnxruntime\n"
        if self.on_hub:
            imports = "import onnxruntime\nfrom huggingface_hub import hf_hub_download\n"
            file = f'hf_hub_download("{self.place.removeprefix("hf-hub:")}", "model.onnx")'
        session = f"session = onnxruntime.InferenceSession({file})\nabout = session.get_modelmeta().custom_metadata_map"
        run = 'features = session.run(None, {"images": images})[0]'
        if not self.plain or self.pixels.value_range != KINDS["8-bit"]:
            prepare = 'images = Pixels.from_metadata(about).prepare("image.png").numpy()'
            return _python(f"{imports}from fastjem.data.pixels import Pixels", f"{session}\n{prepare}\n{run}")
        rounds = "int" if isinstance(self.pixels.size, int) else "round"
        high, wide = height_and_width(self.pixels.size)
        return _python(
            f"import json\n\nimport numpy as np\n{imports}from PIL import Image, ImageOps",
            f'{session}\npixels = json.loads(about["pixels"])',
            f"{self._read()}\n"
            f"width = max({wide}, {rounds}(image.width * {high} / image.height))\n"
            f"height = max({high}, {rounds}(image.height * {wide} / image.width))\n"
            "image = image.resize((width, height), Image.Resampling.BILINEAR)\n"
            f"left, top = round((width - {wide}) / 2), round((height - {high}) / 2)\n"
            f"image = image.crop((left, top, left + {wide}, top + {high}))\n"
            'x = (np.asarray(image) / 255 - pixels["mean"]) / pixels["std"]\n'
            "images = x.transpose(2, 0, 1)[None].astype(np.float32)  # [1, 3, H, W]\n"
            f"{run}",
        )


def _python(*parts: str) -> str:
    return "```python\n" + "\n\n".join(parts) + "\n```"


def _code(value: object) -> str:
    """A name that isn't ours, in Markdown."""
    return f"`{printable(value).replace('`', chr(39))}`"


def _cell(value: object) -> str:
    return printable(value).replace("|", r"\|")


__all__ = ["Card", "facts"]
