"""`fastjem methods`: what can be trained and what it rests on; `fastjem methods NAME`: everything about one."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from fastjem.arguments import Parser
from fastjem.errors import nearest
from fastjem.methods import METHODS, Defaults, Method, Views, combinations, needs_patches, options_of
from fastjem.methods.defaults import TRANSFORMERS_RATE
from fastjem.printing import is_terminal, say

COLUMNS = ("method", "family", "what prevents the trivial solution", "needs", "paper")


def needs(method: type[Method]) -> str:
    """What a method needs beside an encoder and two views; "-" for nothing."""
    views = method.views
    parts = {
        "momentum encoder": method.momentum,
        "queue": options_of(method).get("queue"),
        "multi-crop": views.small,
        f"{views.sources} sources of images": views.sources > 1,
        "classes": method.needs_labels,
        "given weights": "given" in options_of(method),
        "vision transformer": needs_patches(method),
    }
    return ", ".join(name for name, needed in parts.items() if needed) or "-"


def parser() -> Parser:
    parser = Parser("fastjem methods", description="what pretrain can train with")
    parser.add_argument("name", nargs="?", help="of a method: everything about it")
    return parser


def main(argv: Sequence[str]) -> int:
    name = parser().parse_args(argv).name
    if name is None:
        print_table()
        return 0
    if name not in METHODS:
        raise nearest("method", name, METHODS)
    for line in described(name):
        say(line, sys.stdout)
    return 0


def print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, show_lines=True)
    for name, method in METHODS.items():
        about = method.about
        table.add_row(name, about.family, about.prevents_collapse, needs(method), about.paper)
    console = Console() if is_terminal(sys.stdout) else Console(width=160)  # a pipe is no terminal of 80 columns
    console.print(table)


def described(name: str) -> Iterator[str]:
    """The lines about one method: what it is, what it needs, its views, its optimiser, its options and its presets."""
    method = METHODS[name]
    about = method.about
    yield f"{name}: {about.family}"
    yield ""
    yield from (inspect.getdoc(method) or "").splitlines()
    yield ""
    yield f"paper          {about.paper}"
    yield f"no collapse    {about.prevents_collapse}"
    yield f"needs          {needs(method)}"
    yield f"views          {_views(method.views)}"
    yield f"optimiser      {_optimiser(method.defaults)}"
    yield f"               {method.defaults.source}"
    if method.defaults.short:
        optimizer, rate = method.defaults.short
        yield f"               in runs below 10,000 steps {optimizer}, {rate:g}"
    if method.defaults.small:
        optimizer, rate = method.defaults.small
        gently = f" ({TRANSFORMERS_RATE:g})" if rate > TRANSFORMERS_RATE else ""
        of = f"an encoder below 2 M parameters or a transformer{gently}"
        yield f"               in runs below 10,000 steps of {of} {optimizer}, {rate:g}"
    if method.small_widths:
        most = ", ".join(f"{option} at most {times} x its width" for option, times in method.small_widths.items())
        yield f"heads          in runs below 10,000 steps of an encoder below 2 M parameters {most}"
    if said := _by_depth(method.defaults):
        yield f"encoder        {said}, in runs of 10,000 steps and more"
    yield "options        --options NAME=VALUE ..."
    yield from (f"  {option} = {default}" for option, default in options_of(method).items())
    yield from _combined(name)
    yield "presets        --preset NAME, in place of imagenet" if method.presets else "presets        imagenet alone"
    for preset, values in method.presets.items():
        changed = [*values.options.items(), *values.views.items()]
        if values.mask:
            changed.append(("mask of a transformer", values.mask))
        optimiser = [_optimiser(values.defaults)] if values.defaults else []
        yield f"  {preset}: {', '.join([*optimiser, *(f'{key}={value}' for key, value in changed)])} ({values.source})"
    yield f"page           docs/methods/{name}.md"


def _combined(name: str) -> Iterator[str]:
    """Which of a run's options go with a method, and why not the others."""
    method = METHODS[name]
    reasons = {option: combinations.why_not(method, option) for option in combinations.OPTIONS}
    if not method.momentum:  # there is none to take away
        del reasons["no_momentum_encoder"]
    flags = {option: f"--{option.replace('_', '-')}" for option in reasons}
    can = [flags[option] for option, reason in reasons.items() if not reason]
    yield f"combined with  {', '.join([*can, '--momentum-encoder'])}"
    yield from (f"  not with {flags[option]}: {name} {reason}" for option, reason in reasons.items() if reason)


def _views(views: Views) -> str:
    """In words: how many views of which recipe, and every other field that isn't as it is by default."""
    small = f" and {views.small} small ones" if views.small else ""
    said = f"{views.large} large{small}, recipe {views.recipe}"
    others = [
        f"{field.name}={getattr(views, field.name)}"
        for field in fields(views)
        if field.name not in ("large", "small", "recipe") and getattr(views, field.name) != field.default
    ]
    return ", ".join([said, *others])


def _by_depth(defaults: Defaults) -> str:
    """Stochastic depth and what of the learning rate depends on the layer; empty where there is nothing of it."""
    parts = []
    if defaults.drop_path:
        deep = defaults.deep_drop_path
        parts.append(f"drop path {defaults.drop_path:g}" + (f" ({deep:g} from 24 blocks on)" if deep else ""))
    if defaults.layer_decay != 1:
        parts.append(f"layer decay {defaults.layer_decay:g}")
    if defaults.patch_embed_rate != 1:
        parts.append(f"patch embedding at {defaults.patch_embed_rate:g} of the rate")
    return ", ".join(parts)


def _optimiser(defaults: Defaults) -> str:
    decay = f"{defaults.weight_decay:g}"
    if defaults.final_weight_decay is not None:
        decay += f" to {defaults.final_weight_decay:g}"
    clip = f", clip {defaults.clip:g}" if defaults.clip else ""
    return f"{defaults.optimizer}, {defaults.learning_rate:.3g} for 256 images, weight decay {decay}{clip}"
