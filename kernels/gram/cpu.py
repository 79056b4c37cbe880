"""Gram matrices on the CPU: their products are all of it, and torch has those."""

from .tiles import gram_loss

__all__ = ["gram_loss"]
