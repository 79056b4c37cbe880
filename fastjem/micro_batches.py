"""An encoder's passes over a batch, a micro-batch at a time, so that the memory of one of them is enough.

    features = encoder(images)  # [B, C, H, W], with a graph of all images: what this replaces
    loss(features).backward()

GradCache (Gao et al. 2021, arXiv 2101.06983). The first pass has no graph: the features of the whole batch are values,
of which the loss and its gradient are taken. In the second one each micro-batch goes through the encoder again, now
with a graph, and that is given the gradient of its features. The loss and the gradients are those of the whole batch.
A second pass begins as the first one did: with the generators' states, so that dropout and drop path leave out the
same, and with the encoder's buffers, which move in the first pass alone.

`fastjem.large_batches` makes a step of it. A method sees nothing of it but a `Branch` as ever.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastjem.data.batch import rows_of
from fastjem.encoders import Encoder, Features

TOKENS = 1  # the place of the tokens in `tensors_of`


class EncoderPass(NamedTuple):
    """What a `Step` is called with where its encoder alone shall run, as whatever wraps the step must see each call."""

    images: Tensor  # [N, C, H, W]
    options: dict[str, Any]  # of `Encoder.forward`


def parts_of(rows: int, size: int) -> list[slice]:
    """As few parts of at most `size` rows as there can be, and as equal as they can be: of 10 rows by 4, 4, 3 and 3."""
    count = -(-rows // size)
    ends = [-(-rows * (i + 1) // count) for i in range(count)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def tensors_of(features: Features) -> list[Tensor | None]:
    return [features.pooled, features.tokens, *features.layers]


class LateFeatures(Features):
    """Features whose tokens are computed when they are read, by another pass, as hardly a method reads all it could."""

    count: int | None  # of an image's tokens
    make: Callable[[], Tensor]
    made: Tensor | None

    @classmethod
    def of(cls, features: Features, count: int | None, make: Callable[[], Tensor]) -> "LateFeatures":
        late = cls(*features)
        late.count = count
        late.make = make
        late.made = None
        return late

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]
        if self.made is None:
            self.made = self.make()
        return self.made

    def __iter__(self) -> Iterator[Any]:
        return iter((self.pooled, self.tokens, self.layers, self.grid))


def tokens_of_an_image(features: Features) -> int | None:
    """How many there are, of which those that are late needn't be computed; None: none."""
    if isinstance(features, LateFeatures):
        return features.count
    return None if features.tokens is None else features.tokens.shape[1]


@dataclass
class Before:
    """What a pass begins with: the states of the generators that it may draw from, the encoder's buffers by name."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None
    buffers: dict[str, Tensor]

    @classmethod
    def now(cls, encoder: nn.Module, device: torch.device) -> "Before":
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        buffers = {name: x.detach().clone() for name, x in encoder.named_buffers()}
        return cls(device, torch.get_rng_state(), cuda, buffers)

    @torch.no_grad()
    def restore(self, encoder: nn.Module) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        for name, buffer in encoder.named_buffers():
            buffer.copy_(self.buffers[name])


@dataclass
class Call:
    """A call of an encoder with views [B, C, H, W] of one size, in parts, and how each part's pass began."""

    encoder: Encoder
    views: Sequence[Tensor]
    masks: dict[str, list[Tensor]]  # `hidden` or `visible`, [B, ...] of each view
    options: dict[str, Any]  # layers and tokens
    parts: list[slice]
    before: list[Before] = field(default_factory=list)
    like: Features | None = None  # what a pass gave, of which only the places are looked at
    gradients: dict[int, Tensor] = field(default_factory=dict)  # of the features [V B, ...], by place in `tensors_of`

    @property
    def device(self) -> torch.device:
        return self.views[0].device

    def given(self, part: slice) -> EncoderPass:
        """A part of each view and of its masks, behind one another."""
        masks = {name: torch.cat([mask[part] for mask in of_views]) for name, of_views in self.masks.items()}
        views = [rows_of(view, part) for view in self.views]
        return EncoderPass(views[0] if len(views) == 1 else torch.cat(views), {**masks, **self.options})

    def of_part(self, x: Tensor, part: slice) -> Tensor:
        """Of rows [V B, ...] those [V, b, ...] of a part."""
        return x.unflatten(0, (len(self.views), -1))[:, part]

    @torch.no_grad()
    def features(
        self, run: Callable[..., Features], wanted: Callable[[int], bool], *, again: bool
    ) -> dict[int, Tensor]:
        """The wanted ones of the features, by place: values [V B, ...], in the views' order.

        again: every pass begins as it did the first time.
        """
        rows = sum(len(view) for view in self.views)
        made: dict[int, Tensor] = {}
        for i, part in enumerate(self.parts):
            if again:
                self.before[i].restore(self.encoder)
            else:
                self.before.append(Before.now(self.encoder, self.device))
            given = self.given(part)
            found = run(given.images, **given.options)
            for place, x in enumerate(tensors_of(found)):
                if x is None or not wanted(place):
                    continue
                if place not in made:
                    made[place] = x.new_empty(rows, *x.shape[1:])
                self.of_part(made[place], part).copy_(x.unflatten(0, (len(self.views), -1)))
            self.like = found
        return made

    def second_pass(self, i: int, model: Callable[[EncoderPass], Features]) -> tuple[list[Tensor], list[Tensor]]:
        """The features of part i with their graph, and their gradients, of all that have any."""
        self.before[i].restore(self.encoder)
        part = self.parts[i]
        found = tensors_of(model(self.given(part)))
        learning = [(x, place) for place, x in enumerate(found) if place in self.gradients and x is not None]
        learning = [(x, place) for x, place in learning if x.requires_grad]
        gradients = [self.of_part(self.gradients[place], part).reshape(x.shape) for x, place in learning]
        return [x for x, _ in learning], gradients


class Recorded(torch.autograd.Function):
    """Features as they are, as if they had a graph; what comes back of their gradients is left with the call."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Call, places: list[int], *features: Tensor) -> tuple[Tensor, ...]:
        """anchor: any tensor that requires a gradient."""
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.places = places
        ctx.mark_dirty(*features)  # else they would be views of themselves, which a method couldn't change in place
        return features

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        for place, gradient in zip(ctx.places, gradients, strict=True):
            if gradient is not None:
                known = ctx.call.gradients.get(place)
                ctx.call.gradients[place] = gradient if known is None else known + gradient
        return (None,) * (3 + len(gradients))


def recorded(call: Call, made: dict[int, Tensor]) -> dict[int, Tensor]:
    anchor = torch.zeros((), requires_grad=True)
    outputs = Recorded.apply(anchor, call, list(made), *made.values())
    return dict(zip(made, cast(tuple[Tensor, ...], outputs), strict=True))


class Passes:
    """How a `Branch` calls encoders in a step by micro-batches: by `encode`, whose calls wait for `replay`.

    Args:
        size: images of each view in a pass; of V views of one size it has V times as many rows.
        compiler: `torch.compile`, for the passes without a graph; those of `replay` are compiled where the model is.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(self, size: int, *, compiler: Callable[[Encoder], Callable[..., Features]] | None = None):
        if size < 1:
            raise ValueError(f"Passes: size must be at least 1, got {size}")
        self.size = size
        self.compiler = compiler
        self.compiled: dict[int, Callable[..., Features]] = {}  # by the encoder's id
        self.calls: list[Call] = []

    def encode(
        self, encoder: Encoder, views: Sequence[Tensor], masks: dict[str, list[Tensor]], options: dict[str, Any]
    ) -> Features:
        """What the encoder makes of views [B, C, H, W] behind one another, a micro-batch at a time.

        With a gradient the call waits for `replay`. Tokens that neither masks nor options ask for are computed where
        they are read.

        Args:
            masks: `hidden` or `visible` of each view, or nothing.
            options: others of `Encoder.forward`.
        """
        run = self._run_of(encoder)
        call = Call(encoder, views, masks, options, parts_of(len(views[0]), self.size))
        live = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        asks = bool(masks or options.get("tokens") or options.get("layers"))
        made = call.features(run, lambda place: asks or place != TOKENS, again=False)
        if live:
            self.calls.append(call)
            made = recorded(call, made)
        like = cast(Features, call.like)
        layers = tuple(made[place] for place in sorted(made) if place > TOKENS)
        features = Features(made[0], made.get(TOKENS), layers, like.grid)
        call.like = None
        if asks or like.tokens is None:
            return features

        def tokens() -> Tensor:
            now = Before.now(encoder, call.device)
            found = call.features(run, lambda place: place == TOKENS, again=True)
            now.restore(encoder)
            return (recorded(call, found) if live else found)[TOKENS]

        return LateFeatures.of(features, like.tokens.shape[1], tokens)

    def _run_of(self, encoder: Encoder) -> Callable[..., Features]:
        if self.compiler is None:
            return encoder
        if id(encoder) not in self.compiled:
            self.compiled[id(encoder)] = self.compiler(encoder)
        return self.compiled[id(encoder)]

    def constant(self, encode: Callable[[Tensor], Features], views: Sequence[Tensor]) -> Features:
        """Features of views [B, C, H, W] behind one another, by what isn't trained, a micro-batch at a time."""
        found = [encode(rows_of(view, part)) for view in views for part in parts_of(len(view), self.size)]
        tokens = [one.tokens for one in found if one.tokens is not None]
        layers = tuple(torch.cat(same) for same in zip(*(one.layers for one in found), strict=True))
        pooled = torch.cat([one.pooled for one in found])
        return Features(pooled, torch.cat(tokens) if tokens else None, layers, found[0].grid)

    def replay(self, model: Callable[[EncoderPass], Features], around: Callable[[], Any]) -> None:
        """Behind the loss's backward pass: every micro-batch again, now with a graph, which is given the gradient of
        its features. Generators and buffers are behind it as they were.

        Args:
            model: a `Step`, or what wraps it.
            around: makes what the forward passes run in: autocast.
        """
        while self.calls:
            call = self.calls.pop(0)
            now = Before.now(call.encoder, call.device)
            for i in range(len(call.parts) if call.gradients else 0):
                with around():
                    features, gradients = call.second_pass(i, model)
                if features:
                    torch.autograd.backward(features, gradients)
            now.restore(call.encoder)
