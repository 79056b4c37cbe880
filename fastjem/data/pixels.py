"""How pixels become numbers: one object of a run, which whoever uses its encoder needs too; and images seen whole."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

import fastjem.functional as F
from fastjem import fields, reading
from fastjem.data.files import read_file
from fastjem.data.levels import KINDS, Levels
from fastjem.data.parameters import column
from fastjem.data.picture import Picture, picture, to_image
from fastjem.data.size import Size, as_given, height_and_width
from fastjem.data.source import Levelled, Source, decode, path_of, reason
from fastjem.data.views import MEAN, STD, ViewSpec
from fastjem.errors import UserError, nearest

METADATA = "pixels"  # the key in a file's metadata
LARGEST = 2**14  # pixels of an image's side: in float32 one such image takes 3 GiB
COLOUR = Levels()
LONGEST = 16  # times its shorter side: an image that is longer is cut before it is resized
BILINEAR = "bilinear"


@dataclass(frozen=True)
class Pixels:
    """Images are of `size` with `channels` values in `value_range`; the encoder is given
    `((x - low) / (high - low) - mean) / std`, mean and std by channel."""

    size: Size  # of the large views, in pixels: the side of a square, or (height, width)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels: int = 3
    value_range: tuple[float, float] = (0.0, 255.0)
    values: str = "8-bit"  # the kind of values that the range is of, see `fastjem.data.levels.Levels`
    interpolation: str = BILINEAR  # antialiased, of whole images: said to whoever reads a file without fastjem

    def __post_init__(self) -> None:
        for name in ("mean", "std", "value_range"):  # a file has lists
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        object.__setattr__(self, "size", as_given(self.size))
        if not all(1 <= side <= LARGEST for side in height_and_width(self.size)):
            raise ValueError(f"Pixels: size must be between 1 and {LARGEST}, got {self.size}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"Pixels: mean and std must have {self.channels} numbers each, got {self.mean} and {self.std}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) > 0):
            raise ValueError(f"Pixels: mean must be finite and std positive, got {self.mean} and {self.std}")
        if not -np.inf < self.value_range[0] < self.value_range[1] < np.inf:
            raise ValueError(f"Pixels: value_range must be two finite numbers, ascending, got {self.value_range}")
        if self.values not in KINDS:
            raise ValueError(f"Pixels: values must be one of {', '.join(KINDS)}, got {self.values!r}")
        if self.interpolation != BILINEAR:
            raise ValueError(f"Pixels: interpolation must be {BILINEAR}, got {self.interpolation!r}")

    @classmethod
    def of(cls, specs: Sequence[ViewSpec], levels: Levels = COLOUR) -> "Pixels":
        """Those of the first view, which is a large one, of images that are read by `levels`."""
        return cls(specs[0].size, specs[0].mean, specs[0].std, levels.channels, levels.value_range, levels.values)

    @property
    def levels(self) -> Levels:
        """How images are read for these pixels."""
        return Levels(self.channels, self.values, self.value_range)

    @property
    def decoded(self) -> "Pixels":
        """The same for images that were read by `levels`: their values are from 0 to 255."""
        return replace(self, value_range=COLOUR.value_range, values=COLOUR.values)

    def normalise(self, images: Tensor, device: torch.device | str, channels_last: bool = False) -> Tensor:
        """Whole images [B, C, H, W] uint8 or float32 -> [B, C, H, W] float32 as the encoder takes them, on the device.

        Floats below the range are taken as black, those above it as white, and NaN as black.
        """
        if images.dim() != 4 or images.shape[1] != self.channels or images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"Pixels.normalise: images must be [B, {self.channels}, H, W] uint8 or float32, "
                f"got {tuple(images.shape)} {images.dtype}"
            )
        images = images.to(device, non_blocking=True)
        mean, std = self.mean, self.std
        low, high = self.value_range
        if self.value_range != COLOUR.value_range and images.is_floating_point():
            images = (images - low) * (255 / (high - low))
        elif self.value_range != COLOUR.value_range:
            # ((x - low) / (high - low) - mean) / std, written for x / 255
            white = (high - low) / 255
            mean = [low / 255 + mean * white for mean in self.mean]
            std = [std * white for std in self.std]
        table = torch.zeros(len(images), column.COLUMNS, device=device)
        table[:, column.BRIGHTNESS : column.HUE] = 1  # factors that change nothing
        return F.augment(images.permute(0, 2, 3, 1), table, mean=mean, std=std, channels_last=channels_last)

    def prepare(self, images: Any, device: torch.device | str = "cpu") -> Tensor:
        """Images as they come -> [B, C, H, W] float32 as the encoder takes them, H and W those of `size`: the middle of
        each, by this rule for its values. A single image gives B = 1.

        Args:
            images: a path, a file's bytes, an image of Pillow's, an array [H, W] or [H, W, C] of the values that the
                images of the run stored, or a list of these.

        Raises:
            UserError: for what is none of these, and for an image that can't be read, with the reason; for Pillow's of
                a file of colours of more than 8 bits, of which it drops the lower ones.
        """
        several = list(images) if isinstance(images, (list, tuple)) else [images]
        if not several:
            raise UserError("prepare: an image, or a list of images, is needed; got an empty list")
        whole = torch.stack([whole_image(_picture(image, self.levels), self.size) for image in several])
        return self.decoded.normalise(whole, device)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists alone, for a configuration file."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Pixels":
        """What `to_dict` gave; UserError for anything else."""
        if not isinstance(given, Mapping) or "size" not in given:
            raise UserError(f"pixels must be a dict that has a size, got {fields.came(given)}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise nearest("field of pixels", str(name), known)
        try:
            return cls(**fields.conformed(cls, given, "pixels: {}".format))
        except ValueError as error:
            raise UserError(str(error)) from None

    def to_metadata(self) -> dict[str, str]:
        """As safetensors' metadata has it, text by text."""
        return {METADATA: json.dumps(self.to_dict())}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Pixels":
        """What `to_metadata` wrote, among other keys.

        Raises:
            UserError: if there is nothing of the kind.
        """
        if METADATA not in metadata:
            raise UserError(f"the file doesn't say how its encoder takes pixels ({METADATA!r} in its metadata)")
        return cls.from_dict(reading.parsed(metadata[METADATA], METADATA))


def _picture(image: Any, levels: Levels) -> Picture:
    """Of `Pixels.prepare`: one image, whatever it comes as."""
    called = "an image"
    try:
        if isinstance(image, (str, os.PathLike)):
            called = os.fspath(image)
            return to_image(read_file(image), levels)
        if isinstance(image, (bytes, bytearray, memoryview, np.ndarray)):
            return to_image(image, levels)
        if isinstance(image, Image.Image):
            if levels.values != "8-bit" and len(image.getbands()) > 1:
                raise ValueError(
                    f"Pillow keeps 8 bits of colours, and the run's images had other values ({levels.values}); give "
                    "its path, its bytes or an array"
                )
            return picture(ImageOps.exif_transpose(image), levels)
    except Exception as error:  # whatever a decoder may raise on a broken file
        raise UserError(f"prepare: {called} can't be read: {reason(error, called)}") from None
    wanted = "a path, a file's bytes, an image of Pillow's, an array [H, W] or [H, W, C], or a list of these"
    raise UserError(f"prepare: images must be {wanted}, got {type(image).__name__}")


def covering(height: int, width: int, size: Size) -> tuple[int, int]:
    """Height and width to which an image is resized so that it covers `size`: one side is that of `size`, and the other
    no shorter.

    For a square as torchvision's `resize(image, [size])` has it, which rounds the longer side down; for any other
    rectangle as timm's `ResizeKeepRatio`, which rounds it to the nearest pixel.
    """
    high, wide = height_and_width(size)
    if high == wide:
        return max(high, int(height * wide / width)), max(wide, int(width * high / height))
    ratio = min(height / high, width / wide)
    return round(height / ratio), round(width / ratio)


def whole_image(image: Picture, size: Size) -> Tensor:
    """The middle of an image that is resized to cover `size` (bilinear, antialiased): [C, H, W] of its dtype, uint8 or
    float32.

    It is `center_crop(resize(image, covering(...)), [H, W])` of torchvision, and so what timm's
    `create_transform(crop_pct=1.0, crop_mode="center", interpolation="bilinear")` makes of it: bit for bit where the
    image is at most `LONGEST` times as long as `size` asks. Of a longer one the middle alone is resized, which rounds
    differently: a picture of 5000 x 1 pixels, resized as a whole to 224, has 250 million.
    """
    high, wide = height_and_width(size)
    height, width = covering(image.height, image.width, size)
    left, top = round((width - wide) / 2), round((height - high) / 2)
    by_height = image.width * high  # the image is too wide for `size` where this is more than the other
    by_width = image.height * wide
    if max(by_height, by_width) > LONGEST * min(by_height, by_width):
        across = image.width / width
        down = image.height / height
        box = (left * across, top * down, (left + wide) * across, (top + high) * down)
        image = image.resize((wide, high), Image.Resampling.BILINEAR, box)
    else:
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + wide, top + high))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class _WholeImages(Dataset):
    def __init__(self, source: Source, indices: Sequence[int], pixels: Pixels):
        self.source = Levelled(source, pixels.levels)
        self.indices = indices
        self.size = pixels.size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tensor:
        sample = int(self.indices[i])
        try:
            return whole_image(decode(self.source, sample), self.size)
        except Exception as error:  # whatever a decoder may raise on a broken file
            path = path_of(self.source, sample)
            raise UserError(f"{path} can't be read: {reason(error, path)}") from None


def whole_images(source: Source, indices: Sequence[int], pixels: Pixels) -> Dataset:
    """The chosen images without augmentation, read by the pixels' levels: [C, H, W] uint8 or float32 each, for a
    DataLoader; `pixels.decoded.normalise` goes on.

    An image that can't be read is a UserError that names it.
    """
    return _WholeImages(source, indices, pixels)
