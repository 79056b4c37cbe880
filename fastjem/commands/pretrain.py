"""`fastjem pretrain`: `fastjem.pretrain` with its configuration read from the command line."""

from fastjem.pretrain import Config, pretrain

__all__ = ["Config", "main"]


def main(config: Config) -> int:
    """0, or 130 where the run was stopped by a signal: everything is saved then, and --resume goes on."""
    return 0 if pretrain(config).finished else 130
