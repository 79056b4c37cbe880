"""How many images a step takes: as many as the user says, or by default as the data and the ranks can make."""

from fastjem.config import Config
from fastjem.errors import UserError
from fastjem.ranks import Ranks

BATCHES = 3  # that an epoch has at least, where nobody says how large they are


def fitted(config: Config, images: int, ranks: Ranks, *, new: bool) -> tuple[Config, str]:
    """(the configuration with the batch of the run, a line on it where that isn't the usual one).

    A new run whose batch nobody has given takes the largest power of two of which an epoch has `BATCHES`: 32 of 100
    images. With the usual 256 there would be no step at all, and with 100 images and batches of 64 a third of each
    epoch's images would be left out.

    Args:
        images: of an epoch.

    Raises:
        UserError: for a batch that the images or the ranks can't make.
    """
    said = ""
    usual = config.batch_size
    if new and "batch_size" not in config.given:
        most = images // (BATCHES * config.accumulate)
        size = max(1 << max(most, 2).bit_length() - 1, 2 * ranks.size)
        if size < usual:
            size -= size % ranks.size
            config = config.with_values(batch_size=size)
            said = (
                f"batches of {size} images, as there are {images} (of more data {usual}); --batch-size says otherwise"
            )
    _check(config, images, ranks)
    return config, said


def _check(config: Config, images: int, ranks: Ranks) -> None:
    if images < 2:
        raise UserError(f"{config.data} has {images} image, and every method compares images")
    if config.batch_size > images:
        hint = "" if ranks.size > 1 else "; without it the run takes what fits"
        raise UserError(f"--batch-size {config.batch_size} is more than the {images} images in {config.data}{hint}")
    if config.batch_size % ranks.size:
        raise UserError(f"--batch-size {config.batch_size} can't be shared evenly by {ranks.size} ranks")
    if config.batch_size // ranks.size < 2:
        raise UserError(f"--batch-size {config.batch_size} leaves a rank with less than 2 images")


__all__ = ["fitted"]
