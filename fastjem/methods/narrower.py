"""Heads for encoders that are narrower than those the papers had."""

from dataclasses import replace

from fastjem.config import Config
from fastjem.methods.protocol import Method, options_of


def with_small_widths(config: Config, kind: type[Method] | Method, width: int) -> tuple[Config, str]:
    """With heads that fit an encoder of `width`, where the method's are made for a far wider one; and what to tell.

    The user's own come first: options, a projector, a preset, the heads of a run that this one begins with. No layer
    becomes narrower than the output behind it.
    """
    if isinstance(kind, Method) or config.preset != "imagenet" or config.projector or config.weights_of == "all":
        return config, ""
    defaults = {name: value for name, value in options_of(kind).items() if isinstance(value, int)}
    outputs = [name for name in ("dim", "bottleneck") if name in defaults and name not in kind.small_widths]
    wanted = [config.options.get(name, defaults[name]) for name in outputs]
    least = max([output for output in wanted if isinstance(output, int)], default=0)
    narrower = {}
    for name, multiple in kind.small_widths.items():
        if name in defaults and name not in config.options and max(multiple * width, least) < defaults[name]:
            narrower[name] = max(multiple * width, least)
    if not narrower:
        return config, ""
    these = " ".join(f"{name}={value}" for name, value in narrower.items())
    papers = " ".join(f"{name}={defaults[name]}" for name in narrower)
    said = f"a short run of a small encoder has narrower heads, {these}; the paper's are --options {papers}"
    return replace(config, options={**narrower, **config.options}), said
