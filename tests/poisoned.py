"""Arguments of every raw operator with -inf, +inf or NaN put into one of their tensors, and how two answers differ.

An operator's specification says what comes out. Infinities and NaNs must stand in the same places, and what is finite
be the same number.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastjem import ops

VALUES = {"-inf": -torch.inf, "+inf": torch.inf, "nan": torch.nan}
TEMPERATURES = (0.03, 0.04, 0.05, 0.06, 0.07, 0.1, 0.2, 0.3, 0.5, 1.0)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inputs:
    """Makes an operator's arguments; everything random comes from one generator, so that each call gives the same."""

    dtype: torch.dtype
    temperature: float
    width: int  # of rows: logits' prototypes, embeddings' width

    def __call__(self, op: str) -> tuple:
        g = torch.Generator().manual_seed(0)

        def x(*shape: int, dtype: torch.dtype = self.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        return getattr(self, "_" + op.rstrip("_"))(x)

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _rescale(self, x):
        return x(5, self.width), x(1, dtype=self.wide)[0]

    def _rescale_all(self, x):
        return [x(5, self.width), x(7)], x(1, dtype=self.wide)[0], x(1, dtype=self.wide)[0]

    def _ema_update(self, x):
        teacher = [x(5, dtype=self.wide), x(3, self.width, dtype=self.wide)]
        return teacher, [x(5), x(3, self.width)], torch.tensor(0.9, dtype=torch.float64)

    def _of_parameters(self, x, lists: int) -> list[list[Tensor]]:
        return [[x(5, dtype=self.wide), x(3, self.width, dtype=self.wide)] for _ in range(lists)]

    def _lars_norms(self, x):
        parameters, gradients = self._of_parameters(x, 2)
        return parameters, gradients, x(2, 10, dtype=torch.float64).sigmoid(), [0, 1], None

    def _lars(self, x):
        return *self._of_parameters(x, 4), x(2, 10, dtype=torch.float64).sigmoid(), [0, 1], None, None, None

    def _adamw(self, x):
        parameters, gradients, averages, squares, teachers = self._of_parameters(x, 5)
        steps = [torch.ones(()), torch.ones(())]
        settings = x(2, 6, dtype=torch.float64).sigmoid()
        return (
            parameters,
            gradients,
            averages,
            [v.abs() for v in squares],
            steps,
            teachers,
            settings,
            [0, 1],
            None,
            None,
        )

    def _cross_entropy(self, x):
        return x(4, self.width) / self.temperature, torch.tensor([0, 3, -100, self.width - 1]), -100, [True]

    def _cross_entropy_rows(self, x):
        labels, weights = torch.tensor([0, 3, -100, self.width - 1]), x(4, dtype=self.wide).abs()
        return x(4, self.width) / self.temperature, labels, weights, torch.tensor(0.1), -100, [True]

    def _negative_cosine(self, x):
        return x(4, self.width), x(4, self.width), 1e-8, [True, True]

    def _regression(self, x):
        return x(4, self.width), x(4, self.width), 2.0, True, 1e-5, [True]

    def _regression_rows(self, x):
        rows, weights = torch.tensor([2, 0, 1]), x(3, dtype=self.wide).abs()
        return x(4, self.width), x(4, self.width), rows, weights, 2.0, True, 1e-5, [True]

    def _gram_loss(self, x):
        return x(2, 5, self.width), x(2, 5, self.width), True, "keep", [True]

    def _kmeans_step(self, x):
        return x(6, self.width), x(3, self.width, dtype=self.wide), True, True

    def _nearest_k(self, x):
        return x(4, self.width), x(9, self.width), 3

    def _nt_xent(self, x):
        candidates = x(2, 9, self.width)
        return candidates[:, 3:7], candidates, 3, self.temperature, False, True

    def _nt_xent_backward(self, x):
        candidates = x(2, 9, self.width)
        lse = x(2, 9, dtype=torch.float64, scale=0.1) + 1 / self.temperature
        weights = x(2, 9, dtype=torch.float64)
        return candidates[:, 3:7], candidates, lse[:, 3:7], lse, weights, 3, self.temperature, False, True

    def _nt_xent_of_views(self, x):
        return [x(6, self.width), x(6, self.width)], x(2, 6, dtype=self.wide).abs(), None, self.temperature, False

    def _supcon(self, x):
        return x(2, 6, self.width), torch.tensor([0, 1, 1, 2, 0, 3]), None, self.temperature, False, True

    def _info_nce(self, x):
        wanted = [True, True, True, False]
        return x(4, self.width), x(4, self.width), x(9, self.width), None, 5, self.temperature, wanted

    def _scale(self):
        return torch.tensor(1 / self.temperature, dtype=self.wide)

    def _clip_loss(self, x):
        scale = self.width**-0.5
        return x(4, self.width, scale=scale), x(9, self.width, scale=scale), self._scale(), 2

    def _clip_loss_backward(self, x):
        a, b, factor, offset = self._clip_loss(x)
        logits = a.double() @ b.double().T * factor.double()
        return a, b, factor, logits.logsumexp(1), logits.logsumexp(0), offset, [True, True]

    def _clip_loss_of_pairs(self, x):
        scale = self.width**-0.5
        return x(5, self.width, scale=scale), x(5, self.width, scale=scale), self._scale(), 1.0

    def _siglip_loss(self, x):
        a, b, factor, offset = self._clip_loss(x)
        return a, b, factor, x(1, dtype=self.wide)[0], offset, [True, True]

    def _siglip_loss_of_pairs(self, x):
        a, b, learned, _ = self._clip_loss_of_pairs(x)
        return a, b, learned, x(1, dtype=self.wide)[0], 1.0, 1.0, [True, True]

    def _visible(self, x):
        a, b = x(4, self.width, scale=self.width**-0.5 / self.temperature), x(6, self.width)
        ids = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 0, 6, 1, 7, 8])
        exclude = torch.tensor([[False, True, False], [False, False, False]])
        return a, b, [4, 1, 6], *ids, exclude, x(4, dtype=self.wide).abs() + 9, x(6, dtype=self.wide).abs() + 9

    def _similarity_logsumexp(self, x):
        return *self._visible(x), True, True, self.dtype

    def _similarity_logsumexp_backward(self, x):
        visible = self._visible(x)
        numbers = [x(n, dtype=torch.float64) for n in (4, 4, 4, 6, 6, 6)]
        for lse in (numbers[0], numbers[3]):
            lse += 9 + 1 / self.temperature  # no weight is large
        return *visible, *numbers, [True, True], self.dtype

    def _siglip_pairs(self, x):
        a, b, factor, offset = self._clip_loss(x)
        ids = torch.arange(4), torch.arange(9) % 4
        exclude = torch.arange(36).reshape(4, 9) % 7 == 0
        smoothing = torch.tensor(0.1, dtype=self.wide)
        weights = torch.linspace(0.5, 2, 4, dtype=self.wide)
        bias = x(1, dtype=self.wide)[0]
        return a, b, factor, bias, smoothing, weights, *ids, None, exclude, offset, [True, True]

    def _normalize_rows(self, x):
        return x(4, self.width), 1e-12

    def _normalize_rows_backward(self, x):
        shape = (4, self.width)
        divisors = x(4, dtype=torch.float64).abs() + 0.1
        return x(*shape, dtype=self.wide), x(*shape, dtype=self.wide), divisors, 1e-12, self.dtype

    def _nearest_neighbors(self, x):
        return x(4, self.width), x(9, self.width)

    def _koleo_neighbors(self, x):
        candidates = x(12, self.width)
        return candidates[2:8], candidates, 2, 2, 6, 1e-8

    def _koleo(self, x):
        return x(6, self.width), torch.tensor([[1, 2], [0, 3], [1, 4], [1, 5], [3, 0], [1, 2]]), 2.0, 1e-8, [True]

    def _sinkhorn_step(self, x):
        floors = x(6, dtype=torch.float64)
        return x(6, self.width, scale=0.3), x(self.width, dtype=torch.float64), self.temperature, None, floors

    def _sinkhorn_rows(self, x):
        return x(6, self.width, scale=0.3), x(self.width, dtype=torch.float64), self.temperature

    def _sinkhorn_bias(self, x):
        return [x(n, self.width, scale=0.3) for n in (4, 2)], self.temperature, 3, False

    def _sinkhorn(self, x):
        return x(6, self.width, scale=0.3), self.temperature, 3, False, self.wide

    def _sinkhorn_codes(self, x):
        return x(6, self.width, scale=0.3), x(self.width, dtype=torch.float64), self.temperature, self.wide

    def _prototype_cross_entropy(self, x):
        student = [x(4, self.width, scale=0.3) for _ in range(3)]
        teacher = [x(4, self.width, scale=0.3) for _ in range(2)]
        rest = x(2, self.width, dtype=self.wide), "different", x(4, dtype=self.wide).abs(), True, [True] * 3
        return student, teacher, 0.1, self.temperature, *rest

    def _prototype_head_cross_entropy(self, x):
        features = [x(4, 5, scale=0.3) for _ in range(4)]
        prototypes = [x(self.width, 5) for _ in range(2)]
        rest = x(2, self.width, dtype=self.wide), "all", x(4, dtype=self.wide).abs(), [True] * 3
        return [*features[:2], prototypes[0]], features[2:], prototypes[1], 0.1, self.temperature, *rest

    def _prototype_head_usage(self, x):
        features = [x(4, 5, scale=0.3) for _ in range(4)]
        prototypes = [x(self.width, 5) for _ in range(2)]
        rest = x(2, self.width, dtype=self.wide), "all"
        return [*features[:2], prototypes[0]], features[2:], prototypes[1], 0.1, self.temperature, *rest

    def _prototype_head_usage_backward(self, x):
        upstream = x(1, dtype=self.wide)[0]
        slope = x(self.width, dtype=torch.float64)
        return *self._prototype_head_usage(x), upstream, slope, [True] * 3

    def _mean_entropy(self, x):
        return [x(4, self.width, scale=0.3) for _ in range(2)], self.temperature, None, None, [True, True]

    def _characteristic(self, x):
        return x(2, 4, self.width, dtype=self.wide), 3

    def _characteristic_backward(self, x):
        return x(2, 4, self.width, dtype=self.wide), x(2, 3, 2, self.width, dtype=self.wide)

    def _barlow_twins(self, x):
        return x(4, self.width), x(4, self.width), 5e-3, 1, [True, True]

    def _vicreg(self, x):
        return x(4, self.width), x(4, self.width), 25.0, 25.0, 1.0, 1e-4, 1, [True, True]


WITHOUT_TEMPERATURE = {
    "rescale_", "rescale_all_", "ema_update_", "lars_norms", "lars_", "adamw_", "negative_cosine", "regression",
    "nearest_neighbors", "characteristic",
    "characteristic_backward", "barlow_twins", "vicreg", "koleo_neighbors", "koleo", "regression_rows", "gram_loss",
    "kmeans_step", "nearest_k", "normalize_rows", "normalize_rows_backward",
}  # fmt: skip
# (operator, number of the poisoned tensor) where both answers are not finite in the same places, but one may be NaN
# where the other is an infinity: a pair's own weight is added to a product of matrices that has 0 in its place, and 0
# times an infinite embedding is NaN.
KINDS_MAY_DIFFER = {
    (op, i) for op in ("clip_loss_backward", "clip_loss_of_pairs", "similarity_logsumexp_backward") for i in (0, 1)
}  # fmt: skip
# (operator, number of the poisoned tensor, value) that are no input. A log-sum-exp of -inf is one of no logits at all,
# and there are logits; an infinite scale is a temperature of 0; a rate and a weight decay are finite; and the slope of
# a log-sum-exp, an upstream gradient, meets probabilities that are 0 in float32 and tiny numbers in the specification's
# float64.
NO_INPUT = {
    *(
        (op, i, "-inf")
        for op, both in (
            ("nt_xent_backward", (2, 3)),
            ("clip_loss_backward", (3, 4)),
            ("similarity_logsumexp_backward", (4, 7)),
        )
        for i in both
    ),
    *(("similarity_logsumexp_backward", i, value) for i in (5, 8) for value in ("-inf", "+inf")),
    *((op, 2, value) for op in ("clip_loss", "clip_loss_backward", "clip_loss_of_pairs") for value in ("-inf", "+inf")),
    *((op, i, value) for op, i in (("lars_norms", 4), ("lars_", 8)) for value in ("-inf", "+inf")),
}
OF_IMAGES = {"augment", "crop_resize"}
# Of numbers that were drawn, all from 0 to 1.
OF_DRAWN = {
    "keyed_uniform", "block_masks", "even_block_scores", "inverse_rectangle_masks", "multi_block_masks",
}  # fmt: skip
# Operators whose second pass is tried with them, and what it takes beside the upstream gradient, of their arguments and
# of their results beside the loss.
WITH_BACKWARD = {
    "info_nce": lambda given, saved: (*saved, *given[3:6], len(given[0]), given[0].dtype, given[-1]),
    "supcon": lambda given, saved: (*saved, *given[2:], given[0].dtype, [True, False]),
    "nt_xent_of_views": lambda given, saved: (*saved, *given[1:], given[0][0].dtype, [True, False]),
    "clip_loss_of_pairs": lambda given, saved: (*given, *saved, [True, True, True]),
    "siglip_loss_of_pairs": lambda given, saved: (*saved, *given[2:5], given[0].dtype, [True] * 4),
}


def flat(arguments: object) -> list[Tensor]:
    """All tensors of nested arguments or results."""
    if isinstance(arguments, Tensor):
        return [arguments]
    return [x for a in arguments for x in flat(a)] if isinstance(arguments, (list, tuple)) else []


class Place(NamedTuple):
    """Where the value is put: the tensor's number among the floating-point ones, and the name of the elements."""

    tensor: int
    where: str

    def poison(self, arguments: tuple, value: float) -> None:
        x = [t for t in flat(arguments) if t.is_floating_point()][self.tensor]
        x[self._index(x)] = value

    def _index(self, x: Tensor) -> tuple:
        if not x.dim():
            return ()
        row, column = (min(1, n - 1) for n in (x.shape[-2] if x.dim() > 1 else 1, x.shape[-1]))
        before = (0,) * (x.dim() - 2)
        rows = (row,) if x.dim() > 1 else ()
        return {
            "element": (*before, *rows, column),
            "last element": (*before, *rows, -1),
            "row": (*before, *rows, slice(None)),
            "column": (..., column),
            "half a row": (*before, *rows, slice(0, (x.shape[-1] + 1) // 2)),
            "everything": (...,),
        }[self.where]


WHERE = ("element", "last element", "row", "column", "half a row", "everything")


def places(arguments: tuple, where: tuple[str, ...] = WHERE) -> Iterator[Place]:
    tensors = [t for t in flat(arguments) if t.is_floating_point()]
    for i, x in enumerate(tensors):
        yield from (Place(i, name) for name in (where if x.dim() > 1 else where[:1] if not x.dim() else where[:4:3]))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


def _with_gradients(op: str, implementation: Callable, arguments: tuple, result: tuple) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of an operator whose other results are for its second pass, by one implementation."""
    loss, *saved = result
    specified = getattr(implementation, "__wrapped__", None) is ops.reference(op)
    name = f"{op}_backward"
    second = ops.plain(ops.reference(name)) if specified else getattr(torch.ops.fastjem, name)
    return loss, flat(second(torch.ones_like(loss), *WITH_BACKWARD[op](arguments, saved)))


def results(op: str, implementation: Callable, arguments: tuple) -> list[Tensor]:
    """What comes out, or for an operator that works in place, what becomes of its arguments."""
    result = implementation(*arguments)
    if op in WITH_BACKWARD:  # what it keeps is its own, and the gradient's
        loss, gradients = _with_gradients(op, implementation, arguments, result)
        return [loss, *gradients]
    if ops.OPERATORS[op].schema.endswith(("-> (Tensor, Tensor[], Tensor)", "-> (Tensor, Tensor[], Tensor, Tensor[])")):
        loss, gradients, scale, *rest = result  # an implementation may put any part of the scale into the gradients
        result = loss, [g.double() * scale for g in gradients], rest
    return flat(arguments) if op.endswith("_") else flat(result)


def same(got: Tensor, expected: Tensor, dtype: torch.dtype, kinds: bool = True) -> bool:
    """Whether both are the same numbers; without `kinds` an infinity may stand for another one, or for NaN."""
    if got.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    if kinds and not torch.equal(got[~finite].nan_to_num(0, 1, -1), expected[~finite].nan_to_num(0, 1, -1)):
        return False
    g, e = got[finite].double(), expected[finite].double()
    size = e.abs().max().item() if len(e) else 0.0
    return bool(((g - e).abs() <= tolerance(dtype) * max(size, 1e-3)).all())


def differences(
    op: str, implementation: Callable, make: Inputs, where: tuple[str, ...] = WHERE, values=tuple(VALUES)
) -> Iterator[str]:
    """One line for each answer that isn't the specification's."""
    specification = ops.plain(ops.reference(op))
    for place, name in itertools.product(places(make(op), where), values):
        if (op, place.tensor, name) in NO_INPUT:
            continue
        wanted = make(op)
        place.poison(wanted, VALUES[name])
        given = make(op)
        place.poison(given, VALUES[name])
        expected = results(op, specification, wanted)
        got = results(op, implementation, given)
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            if not same(g, e, make.dtype, (op, place.tensor) not in KINDS_MAY_DIFFER):
                yield (
                    f"{op} {str(make.dtype)[6:]} width {make.width} temperature {make.temperature}: {name} in "
                    f"{place.where} of tensor {place.tensor}, result {i}: {_short(g)}, expected {_short(e)}"
                )


def _short(x: Tensor) -> str:
    if x.numel() < 12:
        return str(x.flatten().tolist())
    return f"{x.isnan().sum()} NaN, {x.isposinf().sum()} +inf, {x.isneginf().sum()} -inf of {x.numel()}"
