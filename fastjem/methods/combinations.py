"""What of a run's options goes with which method, and why others don't: docs/combinations.md has the whole table.

A method says for what it is written (`Method.combines`) and what it can't have and why (`Method.refuses`). A reason
goes on behind the method's name: "mae" + "masks its images by itself".
"""

from fastjem.config import Config
from fastjem.errors import UserError
from fastjem.methods.protocol import Method, options_of

# By the field of `Config`; a momentum encoder isn't among them, as every method can be given one.
OPTIONS = ("mask", "large_views", "small_views", "projector", "no_momentum_encoder")


def why_not(method: type[Method] | Method, option: str) -> str:
    """Why a method can't have an option of `OPTIONS`, in words that go on behind its name; empty where it can."""
    if option in method.combines:
        return ""
    if reason := method.refuses.get(option):
        return reason
    if option == "mask":
        return _why_no_mask(method)
    if option == "no_momentum_encoder":
        return "can't do without its momentum encoder" if method.momentum else ""
    if option == "projector":
        return "" if method.projector_options else "has no projector that is made of widths"
    if option == "small_views" and method.views.small:
        return ""
    return f"compares exactly {method.views.large} large views"


def _why_no_mask(method: type[Method] | Method) -> str:
    if not method.views.mask:
        return ""
    kind = method if isinstance(method, type) else type(method)
    own = f": --options mask={method.views.mask:g}" if "mask" in options_of(kind) else ""
    return f"masks its images by itself{own}"


def check(config: Config, method: type[Method] | Method) -> None:
    """UserError for an option that can't be combined with the method, with the reason.

    Whether a method can go without its momentum encoder may be a question of its options: `Step` asks.
    """
    if isinstance(method, Method):
        for option in ("large_views", "projector", "momentum_encoder"):
            told = getattr(method.run, option)
            if getattr(config, option) not in (None, True) and getattr(config, option) is not told:
                raise UserError(f"{config.flag(option)}: the method is made already; RunFacts({option}=...) tells it")
    asked = {
        "mask": bool(config.mask),
        "large_views": config.large_views is not None,
        "small_views": bool(config.small_views),
        "projector": config.projector is not None,
    }
    for option, is_asked in asked.items():
        if is_asked and (reason := why_not(method, option)):
            raise UserError(f"{config.flag(option)}: {config.method} {reason}")
    both = [option for option in config.options if option in method.projector_options]
    if config.projector is not None and both:
        raise UserError(f"--projector has the projector's widths already: give it or --options {both[0]}")


__all__ = ["OPTIONS", "check", "why_not"]
