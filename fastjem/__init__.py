"""fastjem: joint-embedding pretraining of image encoders at the speed of the hardware."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastjem")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0+unknown"
