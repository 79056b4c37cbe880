"""What a method is to a run, and a run to a method.

A method is a subclass of `Method`: a few declared attributes, its heads, and `loss`. It is given the two sides of an
encoder as `Branch`es and a `Batch`; everything else (data, optimiser, ranks, checkpoints) is the run's business.
`docs/adding-a-method.md` builds one from nothing.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastjem.data.batch import Batch, Masks
from fastjem.data.size import Size
from fastjem.data.views import MEAN, STD, Views
from fastjem.encoders import Encoder, Features
from fastjem.errors import nearest
from fastjem.methods.defaults import Defaults, Preset
from fastjem.micro_batches import LateFeatures, Passes, tokens_of_an_image

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class RunFacts:
    """What a run tells its method; 0 where it isn't known (in a loop of one's own, say)."""

    images: int = 0  # in the data
    classes: int = 0  # that its labels tell apart
    steps: int = 0  # optimiser steps of the whole run
    steps_per_epoch: int = 1
    batch: int = 0  # images of one forward pass over all ranks
    accumulate: int = 1  # forward passes of one optimiser step
    ranks: int = 1
    seed: int = 0
    image_size: Size = 0  # of the large views, in pixels, or (height, width); where it grows on the way, in the end
    image_sizes: tuple[Size, ...] = ()  # of each stage, where it grows on the way; batches have their own size
    patch: int = 0  # of the encoder, in pixels; 1: it has none
    channels: int = 3
    prefix_tokens: int = 0  # of the encoder
    batch_norm: bool = False  # whether the encoder has any
    large_views: int = 0  # that the user wants of an image; 0: as many as the method has by itself
    projector: tuple[int, ...] = ()  # widths of its layers that the user wants; (): the method's own
    momentum_encoder: bool | None = None  # that the user wants or doesn't; None: as the method has it
    group: "dist.ProcessGroup | None" = None  # of all ranks, for losses of the global batch

    @property
    def images_per_step(self) -> int:
        """Over all ranks and forward passes of an optimiser step."""
        return self.batch * self.accumulate


@dataclass(frozen=True)
class About:
    """What `fastjem methods` says of a method."""

    family: str
    prevents_collapse: str  # what forbids the trivial solution
    paper: str


class Codes(NamedTuple):
    """A teacher's prototype scores, as what they are computed from: the product is taken on logged steps only."""

    features: Tensor  # [B, D]
    prototypes: Tensor  # [K, D]
    bias: Tensor  # [K]
    temperature: float  # the probabilities are softmax(features @ prototypes.T / temperature + bias)


class Branch:
    """An encoder and its heads: the live ones, or the momentum encoder's copies.

    Heads are attributes by their names in the method: `branch.projector(x)`. A head that has no momentum copy is the
    live one on both sides. The encoder is called through `encode` or `project`, which also note what the log shows.

    Args:
        momentum: which of the two this is.
        notes: where `note` leaves figures; see `fastjem.health.figures` for those that it knows.
        masked: views of the batch with the masks that the run has put on them, for a method that has none of its own:
            `encode` gives the encoder the visible patches alone. Views are told by what they are, not by their place,
            so any choice of them may be encoded, but no other tensors.
        passes: how the encoder is called in a step by micro-batches (`fastjem.micro_batches`); None: at once.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: Mapping[str, nn.Module],
        *,
        momentum: bool = False,
        notes: dict[str, Any] | None = None,
        masked: Sequence[tuple[Tensor, Masks]] = (),
        passes: Passes | None = None,
    ):
        self._encoder = encoder
        self.heads = heads
        self.momentum = momentum
        self.masked = masked
        self.passes = passes
        self.notes = {} if notes is None else notes

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["heads"][name]
        except KeyError:
            raise AttributeError(f"the method has no head {name!r}") from None

    @property
    def encoder(self) -> Encoder:
        """The encoder itself, which knows nothing of the run's masks and micro-batches.

        Raises:
            ValueError: where the run has put masks on the views, which a call past `encode` would leave out; where its
                gradient comes by micro-batches, which such a call would know nothing of.
        """
        if self.masked:
            raise ValueError("Branch: with masks the encoder is called through encode or project alone")
        if self.passes is not None and not self.momentum and torch.is_grad_enabled():
            kind = type(self._encoder).__name__
            raise ValueError(f"Branch: with micro-batches the {kind} is called through encode or project alone")
        return self._encoder

    def note(self, **figures: Any) -> None:
        """Leave figures for the log: `embedding` [B, D], `projection` [B, D], `codes`, or any 0-dim tensor by name."""
        self.notes |= figures

    def encode(
        self,
        views: Sequence[Tensor],
        masks: Mapping[int, Masks] | None = None,
        *,
        layers: int = 0,
        tokens: bool = False,
    ) -> Features:
        """V tensors [B, C, H, W] -> features of V B rows in the views' order.

        Neighbouring views of one size go through the encoder in one call.

        Args:
            masks: by place in `views`. A view with `visible` patches is given these alone; one without has its `hidden`
                patches replaced by the mask token.
            layers, tokens: see `Encoder.forward`. A transformer gives tokens unasked, too, which in a step by
                micro-batches takes a pass more where there are neither masks nor layers.

        Returns:
            `Features`; `tokens` and `layers` only if all views have the same number of tokens. Where the run has put
            masks on the views, tokens are those of the visible patches.

        Raises:
            ValueError: where the run has put masks on the views, for any other tensor, for masks besides, and for
                layers or the tokens of whole views.
        """
        if self.masked:
            if masks or layers or tokens:
                raise ValueError("Branch.encode: the views have masks, so there are no others, layers or whole tokens")
            masks = self._masks_of(views)
        masks = masks or {}
        groups: list[list[int]] = []
        for i, view in enumerate(views):
            before = groups[-1][-1] if groups else -1
            if groups and view.shape == views[before].shape and (i in masks) == (before in masks):
                groups[-1].append(i)
            else:
                groups.append([i])
        parts = [
            self._encode_one_size([views[i] for i in at], [masks.get(i) for i in at], layers, tokens) for at in groups
        ]
        features = parts[0] if len(parts) == 1 else _joined(parts)
        if not self.momentum:
            self.notes.setdefault("embedding", features.pooled.detach()[: len(views[0])])
        return features

    def _masks_of(self, views: Sequence[Tensor]) -> dict[int, Masks]:
        """By place in `views`, the masks that the run has put on them."""
        found: dict[int, Masks] = {}
        for i, view in enumerate(views):
            for known, mask in self.masked:
                if known is view:
                    found[i] = mask
                    break
            else:
                raise ValueError(
                    f"Branch.encode: the batch's views have masks, and number {i} of the {len(views)} that came is "
                    "none of them"
                )
        return found

    def _encode_one_size(
        self, views: list[Tensor], masks: Sequence[Masks | None], layers: int, tokens: bool
    ) -> Features:
        found = [mask for mask in masks if mask is not None]
        if not found:
            return self._call(views, {}, {"layers": layers, "tokens": tokens})
        visible = [mask.visible for mask in found if mask.visible is not None]
        if 0 < len(visible) < len(found):
            raise ValueError("Branch.encode: views of one size must all have visible patches in their masks, or none")
        if visible:
            return self._call(views, {"visible": visible}, {"layers": layers})
        return self._call(views, {"hidden": [mask.hidden for mask in found]}, {"layers": layers})

    def _call(self, views: list[Tensor], masks: dict[str, list[Tensor]], options: dict[str, Any]) -> Features:
        if self.passes is not None:
            return self.passes.encode(self._encoder, views, masks, options)
        return self._encoder(_cat(views), **{name: _cat(of_views) for name, of_views in masks.items()}, **options)

    @torch.no_grad()
    def constant(self, encode: Callable[[Tensor], Features], views: Sequence[Tensor]) -> Features:
        """Features of views [B, C, H, W] of one size by an encoder that isn't trained, such as `fastjem.given.Given`:
        of V B rows in the views' order, without a gradient.
        """
        return encode(_cat(views)) if self.passes is None else self.passes.constant(encode, views)

    def project(self, views: Sequence[Tensor]) -> Tensor:
        """V tensors [B, C, H, W] -> [V B, P] through encoder and projector."""
        z = self.projector(self.encode(views).pooled)
        if not self.momentum:
            self.notes.setdefault("projection", z.detach()[: len(views[0])])
        return z


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _joined(parts: Sequence[Features]) -> Features:
    """Rows of several calls; tokens where all have as many."""
    pooled = torch.cat([part.pooled for part in parts])
    counts = {tokens_of_an_image(part) for part in parts}
    if None in counts or len(counts) > 1:
        return Features(pooled)
    layers = tuple(torch.cat(same) for same in zip(*(part.layers for part in parts), strict=True))
    grids = {part.grid for part in parts}
    joined = Features(pooled, None, layers, grids.pop() if len(grids) == 1 else None)

    def tokens() -> Tensor:
        return torch.cat([cast(Tensor, part.tokens) for part in parts])

    if any(isinstance(part, LateFeatures) for part in parts):
        return LateFeatures.of(joined, counts.pop(), tokens)
    return joined._replace(tokens=tokens())


class Method(nn.Module):
    """A method of self-supervised pretraining. Subclasses declare what isn't the default and define `loss`.

    Args:
        width: D of the encoder's embeddings.
        run: what the run knows of itself.

    A subclass's keyword-only arguments are its options (`--options NAME=VALUE`); each has a type and a default.
    """

    about: ClassVar[About]
    defaults: ClassVar[Defaults]
    presets: ClassVar[Mapping[str, Preset]] = {}  # by name, beside "imagenet": its own values
    views: Views = Views(large=2)  # an instance may have its own: an option can change the masks
    momentum: tuple[str, ...] = ()  # what has a momentum copy: "encoder", and heads by name
    constant_rate: tuple[str, ...] = ()  # heads whose learning rate doesn't follow the schedule
    pool: ClassVar[str | None] = None  # how a vision transformer's tokens become the embedding; None: its own way
    mask_token: ClassVar[bool] = False  # whether hidden patches are replaced, for which the encoder needs a token
    needs_labels: ClassVar[bool] = False  # of classes, as folders give them
    # Whether the loss is the mean of losses of single images, each of which knows nothing of the others but by a batch
    # norm in a head: without one, micro-batches with the weights of their images are the batch. Inherited with `loss`.
    mean_over_images: ClassVar[bool] = False
    no_graph: ClassVar[str] = ""  # why its step can't be a CUDA graph, where the host has a part in each step
    frozen: tuple[str, ...] = ()  # parts of the backbone that aren't trained, by name; one it doesn't have is none
    mean: tuple[float, ...] = MEAN  # how the run normalises the views' pixels, which it sets
    std: tuple[float, ...] = STD
    asymmetric: bool = False  # only asymmetry forbids collapse: fastjem.health.Alarm listens more closely
    combines: frozenset[str] = frozenset()  # the options of a run that it is written for, of
    refuses: ClassVar[Mapping[str, str]] = {}  # `fastjem.methods.combinations`; others it can't have, and why
    projector_options: ClassVar[tuple[str, ...]] = ()  # of its own, in whose place `--projector` has widths
    # Options that are widths -> the largest multiple of the encoder's width that a short run of a small encoder has.
    small_widths: ClassVar[Mapping[str, int]] = {}

    def __init__(self, width: int, run: RunFacts = RunFacts()):
        super().__init__()
        self.width = width
        self.run = run
        if run.large_views:
            self.views = replace(self.views, large=run.large_views)

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "loss" in vars(cls) and "mean_over_images" not in vars(cls):
            cls.mean_over_images = False

    def projector_widths(self, *own: int) -> tuple[int, ...]:
        """Widths of the projector's layers, the last one its output's: the user's, or else the method's own."""
        return self.run.projector or own

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor | dict[str, Tensor]:
        """The loss of a batch, 0-dim; or terms by name, which are summed and logged one by one.

        Args:
            student: the live encoder and heads.
            teacher: the momentum copies (`teacher.momentum` is true), or `student` itself where there are none.
            batch: on the device.
            step: number of the optimiser step, 0-dim int64 on the device. Nothing may wait for it.
        """
        raise NotImplementedError

    def step_ends(self, step: Tensor) -> None:
        """Once behind every optimiser step, however many forward passes it had: centres, queues and statistics move."""

    def epoch_begins(self, epoch: int) -> None:
        """Before the first step of an epoch, of what the last one left in buffers (by `batch.index`): clustering, say.

        A run that is resumed within an epoch goes on with what its buffers hold.
        """


def preset_of(method: type[Method] | Method, name: str) -> Preset:
    """A method's preset; "imagenet" is its own values.

    Raises:
        UserError: for one that it doesn't have.
    """
    presets = {"imagenet": Preset("the paper"), **method.presets}
    if name not in presets:
        kind = method if isinstance(method, type) else type(method)
        raise nearest(f"preset of {kind.__name__}", name, presets)
    return presets[name]


def needs_patches(method: type[Method] | Method) -> bool:
    """Whether patches are hidden from its encoder, which must be a vision transformer then."""
    return bool(method.views.mask or method.mask_token)


def options_of(method: type[Method]) -> dict[str, Any]:
    """A method's options with their defaults: the keyword-only arguments of its constructor."""
    return dict(method.__init__.__kwdefaults__ or {})


def option_types(method: type[Method], name: str) -> set[type]:
    """The types that an option may have, by its annotation."""
    hint = typing.get_type_hints(method.__init__)[name]
    return set(typing.get_args(hint)) or {hint}
