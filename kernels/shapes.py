"""What each operator's arguments must be for its kernels, which are given addresses: shapes and dtypes that fit.

`guard.py` looks at them before every launch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .arithmetic import widest_dtype
from .augment.columns import COLUMNS
from .contrastive import shapes as contrastive
from .expect import alike as _alike
from .expect import expect as _expect
from .expect import fail, told
from .expect import same_width as _same_width
from .masks import shapes as masks
from .optimizers import columns

# Of each operator: a function of its arguments that raises where they don't fit one another ---------------------------


def _rescale(op, _gradients, *factors):
    for factor in factors:
        if factor.numel() != 1:
            fail(op, "a factor must be one number", told(factor))


def _ema_update(teacher, student, momentum):
    if len(teacher) != len(student) or momentum.numel() != 1:
        came = f"{len(teacher)}, {len(student)} and {told(momentum)}"
        fail("ema_update_", "teacher and student must be as many tensors, momentum one number", came)
    for t, s in zip(teacher, student, strict=True):
        if t.shape != s.shape or t.dtype not in (torch.float32, torch.float64):
            contract = "teacher and student must have the same shapes, and teacher be float32 or float64"
            fail("ema_update_", contract, f"{told(t)} and {told(s)}")


def _lars_norms(parameters, gradients, settings, groups, *factors):
    _updates("lars_norms", parameters, gradients)
    _settings("lars_norms", settings, groups, len(parameters), len(columns.LARS), factors)


def _lars(parameters, gradients, buffers, teachers, settings, groups, norms, *factors):
    op = "lars_"
    if buffers and len(buffers) != len(parameters):
        fail(op, "there must be a buffer for each parameter, or none", f"{len(buffers)} and {len(parameters)}")
    _updates(op, parameters, gradients, buffers, teachers)
    _settings(op, settings, groups, len(parameters), len(columns.LARS), factors)
    _expect(op, "norms", norms, (len(parameters), 2), torch.float64)


def _adamw(parameters, gradients, averages, squares, steps, teachers, settings, groups, *factors):
    op = "adamw_"
    if not len(averages) == len(squares) == len(steps) == len(parameters):
        came = f"{len(averages)}, {len(squares)}, {len(steps)} and {len(parameters)}"
        fail(op, "there must be an average, a square and a step for each parameter", came)
    for x in steps:
        _expect(op, "steps", x, (), torch.float32)
    _updates(op, parameters, gradients, averages, squares, teachers)
    _settings(op, settings, groups, len(parameters), len(columns.ADAMW), factors)


def _updates(op: str, parameters: list[Tensor], gradients: list[Tensor], *others: list[Tensor]) -> None:
    """Refuse anything but tensors of the parameters' shapes, all but the gradients of their dtypes too."""
    if not parameters or len(gradients) != len(parameters) or max(map(len, others), default=0) > len(parameters):
        came = ", ".join(str(len(tensors)) for tensors in (parameters, gradients, *others))
        fail(op, "there must be parameters, as many gradients, and no more of what goes with them", came)
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if p.dtype not in (torch.float32, torch.float64) or not g.is_floating_point() or p.shape != g.shape:
            contract = "parameters must be float32 or float64, gradients of their shapes and floating-point"
            fail(op, contract, f"{told(p)} and {told(g)} at {i}")
        for tensors in others:
            if i < len(tensors) and (tensors[i].shape != p.shape or tensors[i].dtype != p.dtype):
                contract = "averages and teachers must be of their parameters' shapes and dtypes"
                fail(op, contract, f"{told(tensors[i])} for {told(p)} at {i}")


def _settings(op: str, settings: Tensor, groups: list[int], count: int, width: int, factors: tuple) -> None:
    _expect(op, "settings", settings, (*settings.shape[:1], width), widest_dtype(settings.device))
    if len(groups) != count or min(groups) < 0 or max(groups) >= len(settings):
        fail(op, f"groups must be {count} rows of settings {told(settings)}", groups)
    for x in factors:
        if x is not None and x.numel() != 1:
            fail(op, "grad_scale and found_inf must be one number each", told(x))


def _cross_entropy(logits, labels, *_):
    _alike("cross_entropy", "logits", logits)
    _expect("cross_entropy", "labels", labels, (len(logits),), torch.int64)


def _cross_entropy_rows(logits, labels, weights, label_smoothing, *_):
    op = "cross_entropy_rows"
    _alike(op, "logits", logits)
    _expect(op, "labels", labels, (len(logits),), torch.int64)
    _expect(op, "weights", weights, (len(logits),))
    _expect(op, "label_smoothing", label_smoothing, ())


def _negative_cosine(p, z, *_):
    _alike("negative_cosine", "p and z", p, z)


def _regression(prediction, target, *_):
    _alike("regression", "prediction and target", prediction, target)


def _regression_rows(prediction, target, rows, weights, *_):
    _alike("regression_rows", "prediction and target", prediction, target, rows=True)
    _expect("regression_rows", "rows", rows, (rows.numel(),), torch.int64)
    _expect("regression_rows", "weights", weights, (len(rows),))


def _two_views(op, z0, z1, *_):
    _alike(op, "z0 and z1", z0, z1, rows=True)


def _characteristic(theta, frequencies):
    _alike("characteristic", "theta", theta, dims=3, rows=True)


def _characteristic_backward(theta, weights):
    _alike("characteristic_backward", "theta", theta, dims=3, rows=True)
    views, _, slices = theta.shape
    _expect("characteristic_backward", "weights", weights, (2, *weights.shape[1:2], views, slices))


def _images(op, shape, images):
    if images.dim() != 4 or not images.numel() or images.dtype not in (torch.uint8, torch.float32):
        fail(op, f"images must be {shape} uint8 or float32, and not empty", told(images))


def _augment(images, parameters, mean, std, dtype, channels_last, exact, *_):
    _images("augment", "[B, H, W, C]", images)
    _expect("augment", "parameters", parameters, (len(images), COLUMNS))
    if len(mean) != images.shape[3] or len(std) != images.shape[3]:
        fail("augment", "mean and std must have C numbers each", f"{told(images)}, {len(mean)} and {len(std)}")
    if exact and images.dtype != torch.uint8:
        fail("augment", "images must be uint8 with exact", told(images))


def _crop_resize(images, indices, parameters, size, *_):
    _images("crop_resize", "[N, H, W, C]", images)
    _expect("crop_resize", "indices", indices, (indices.numel(),), torch.int64)
    _expect("crop_resize", "parameters", parameters, (len(indices), COLUMNS))
    if min(size) < 1:
        fail("crop_resize", "size must be positive", tuple(size))


def _views(op: str, rows: Tensor, candidates: Tensor, *_: object) -> None:
    """[V, n, D] and [V, N, D]."""
    _alike(op, "rows", rows, dims=3)
    v, _n, d = rows.shape
    _expect(op, "candidates", candidates, (v, *candidates.shape[1:2], d), rows.dtype)


def _nt_xent(rows, candidates, *_):
    _views("nt_xent", rows, candidates)


def _nt_xent_backward(rows, candidates, rows_lse, candidates_lse, weights, *_):
    op = "nt_xent_backward"
    _views(op, rows, candidates)
    _expect(op, "rows_lse", rows_lse, tuple(rows.shape[:2]))
    _expect(op, "candidates_lse", candidates_lse, tuple(candidates.shape[:2]))
    _expect(op, "weights", weights, tuple(candidates.shape[:2]))


def _clip_loss(x, y, *_):
    _same_width("clip_loss", "x and y", x, y)


def _clip_loss_backward(x, y, logit_scale, x_lse, y_lse, *_):
    _same_width("clip_loss_backward", "x and y", x, y)
    _expect("clip_loss_backward", "x_lse", x_lse, (len(x),))
    _expect("clip_loss_backward", "y_lse", y_lse, (len(y),))


def _siglip_loss(x, y, *_):
    _same_width("siglip_loss", "x and y", x, y)


def _visible(op: str, a, b, own_image, row_ids, column_ids, exclude, row_limit, column_limit) -> None:
    """Rows [N, D], columns [M, D], and what `contrastive.visible.Visible` consists of."""
    _same_width(op, "a and b", a, b)
    if a.dtype != b.dtype or not a.is_floating_point():
        fail(op, "a and b must be of one floating-point dtype", f"{told(a)} and {told(b)}")
    if len(own_image) != 3 or own_image[0] < 1 or own_image[2] < 0:
        fail(op, "own_image must be a row period of at least 1, an offset, a column period", own_image)
    _expect(op, "row_ids", row_ids, (len(a),), torch.int64)
    _expect(op, "column_ids", column_ids, (len(b),), torch.int64)
    if (row_ids is None) != (column_ids is None):
        fail(op, "row_ids and column_ids must be given both or neither", "one of them")
    if exclude is not None:
        if exclude.dim() != 2 or exclude.dtype != torch.bool or not exclude.numel():
            fail(op, "exclude must be [n, m] bool and not empty", told(exclude))
        if len(a) % exclude.shape[0] or len(b) % exclude.shape[1]:
            fail(op, f"exclude must repeat in [{len(a)}, {len(b)}]", told(exclude))
    _expect(op, "row_limit", row_limit, (len(a),))
    _expect(op, "column_limit", column_limit, (len(b),))


def _similarity_logsumexp(*arguments):
    _visible("similarity_logsumexp", *arguments[:8])


def _similarity_logsumexp_backward(*arguments):
    op = "similarity_logsumexp_backward"
    _visible(op, *arguments[:8])
    for name, vector in zip(("row_lse", "row_slope", "row_total_slope"), arguments[8:11], strict=True):
        _expect(op, name, vector, (len(arguments[0]),))
    for name, vector in zip(("column_lse", "column_slope", "column_total_slope"), arguments[11:14], strict=True):
        _expect(op, name, vector, (len(arguments[1]),))


def _siglip_pairs(x, y, _scale, _bias, _smoothing, weights, row_ids, column_ids, positives, exclude, *_):
    op = "siglip_pairs"
    _same_width(op, "x and y", x, y)
    _expect(op, "weights", weights, (len(x),))
    _expect(op, "row_ids", row_ids, (len(x),), torch.int64)
    _expect(op, "column_ids", column_ids, (len(y),), torch.int64)
    if (row_ids is None) != (column_ids is None):
        fail(op, "row_ids and column_ids must be given together", "one of them")
    _expect(op, "positives", positives, (len(x), len(y)), torch.bool)
    _expect(op, "exclude", exclude, (len(x), len(y)), torch.bool)


def _nearest_neighbors(query, bank):
    _same_width("nearest_neighbors", "query and bank", query, bank)


def _kmeans_step(features, centroids, *_):
    _same_width("kmeans_step", "features and centroids", features, centroids)
    if not len(features) or not len(centroids):
        fail("kmeans_step", "features and centroids must have rows", f"{told(features)} and {told(centroids)}")


def _nearest_k(query, bank, k):
    _same_width("nearest_k", "query and bank", query, bank)
    if not len(query) or not len(bank) or k < 1:
        fail("nearest_k", "query and bank must have rows, k be positive", f"{told(query)}, {told(bank)} and {k}")


def _gram_loss(student, teacher, *_):
    _alike("gram_loss", "student and teacher", student, teacher, dims=3, rows=True)


def _koleo_neighbors(rows, candidates, offset, topk, group_size, *_):
    op = "koleo_neighbors"
    _same_width(op, "rows and candidates", rows, candidates)
    n, others = len(rows), len(candidates)
    if not 0 <= offset <= others - n or group_size < 1 or others % group_size:
        came = f"{n} at {offset}, {others} and {group_size}"
        fail(op, "rows must be among the candidates, whose number is a multiple of group_size", came)
    if topk < 1 or topk > max(group_size - 1, 1):
        fail(op, "topk must be at least 1 and less than group_size", f"{topk} and {group_size}")


def _koleo(x, neighbors, *_):
    _alike("koleo", "x", x, rows=True)
    _expect("koleo", "neighbors", neighbors, (len(x), *neighbors.shape[1:2]), torch.int64)
    if not neighbors.numel():
        fail("koleo", "neighbors must not be empty", told(neighbors))


def _scores(op: str, scores: Tensor, bias: Tensor | None = None) -> None:
    _alike(op, "scores", scores, dims=3 if scores.dim() == 3 else 2)  # one problem, or several
    _expect(op, "bias", bias, (*scores.shape[:-2], scores.shape[-1]))


def _sinkhorn_step(scores, bias, _epsilon, rows=None, log_floors=None):
    _scores("sinkhorn_step", scores, bias)
    _expect("sinkhorn_step", "rows", rows, (), torch.int64)
    _expect("sinkhorn_step", "log_floors", log_floors, scores.shape[:-1])


def _sinkhorn_bias(scores, _epsilon, _iterations, _first, rows=None):
    for x in scores:
        _scores("sinkhorn_bias", x)
        _expect("sinkhorn_bias", "scores", x, (*scores[0].shape[:-2], *x.shape[-2:-1], scores[0].shape[-1]))
    _expect("sinkhorn_bias", "rows", rows if len(scores) == 1 else None, (), torch.int64)


def _sinkhorn(scores, *_):
    _scores("sinkhorn", scores)


def _sinkhorn_rows(scores, bias, *_):
    _scores("sinkhorn_rows", scores, bias)


def _sinkhorn_codes(scores, bias, *_):
    _scores("sinkhorn_codes", scores, bias)


def _student_and_teacher(
    op: str, student: list[Tensor], teacher: list[Tensor], prototypes: int, bias: Tensor | None, weights: Tensor | None
) -> None:
    if not student or not teacher:
        fail(op, "student and teacher must have views", f"{len(student)} and {len(teacher)}")
    _alike(op, "student views", *student)
    _alike(op, "teacher views", *teacher)
    _expect(op, "teacher views", teacher[0], tuple(student[0].shape))
    _expect(op, "weights", weights, (len(student[0]),))
    if bias is not None and bias.shape != (prototypes,) and bias.shape != (len(teacher), prototypes):
        fail(op, f"teacher_bias must be [{prototypes}] or [{len(teacher)}, {prototypes}]", told(bias))


def _prototype_cross_entropy(student, teacher, _student, _teacher, bias, _pairs, weights, *_):
    prototypes = student[0].shape[-1] if student else 0
    _student_and_teacher("prototype_cross_entropy", student, teacher, prototypes, bias, weights)


def _prototype_head_cross_entropy(inputs, teacher, teacher_prototypes, _student, _teacher, bias, _pairs, weights, *_):
    op = "prototype_head_cross_entropy"
    *student, prototypes = inputs
    _student_and_teacher(op, student, teacher, len(prototypes), bias, weights)
    _same_width(op, "features and prototypes", student[0], prototypes)
    _expect(op, "teacher_prototypes", teacher_prototypes, tuple(prototypes.shape))


def _prototype_head_usage(inputs, teacher, teacher_prototypes, _student, _teacher, bias, _pairs, *rest):
    op = "prototype_head_usage" + ("_backward" if rest else "")
    *student, prototypes = inputs
    _student_and_teacher(op, student, teacher, len(prototypes), bias, None)
    _same_width(op, "features and prototypes", student[0], prototypes)
    _expect(op, "teacher_prototypes", teacher_prototypes, tuple(prototypes.shape))
    if rest:
        _expect(op, "upstream", rest[0], ())
        _expect(op, "slope", rest[1], (len(prototypes),))


def _mean_entropy(scores, temperature, total, *_):
    _alike("mean_entropy", "scores", *scores)
    _expect("mean_entropy", "total", total, (scores[0].shape[1],))


SHAPES: dict[str, Callable[..., None]] = {
    "rescale_": partial(_rescale, "rescale_"),
    "rescale_all_": partial(_rescale, "rescale_all_"),
    "ema_update_": _ema_update,
    "lars_norms": _lars_norms,
    "lars_": _lars,
    "adamw_": _adamw,
    "cross_entropy": _cross_entropy,
    "cross_entropy_rows": _cross_entropy_rows,
    "negative_cosine": _negative_cosine,
    "regression": _regression,
    "regression_rows": _regression_rows,
    "barlow_twins": partial(_two_views, "barlow_twins"),
    "vicreg": partial(_two_views, "vicreg"),
    "characteristic": _characteristic,
    "characteristic_backward": _characteristic_backward,
    "augment": _augment,
    "crop_resize": _crop_resize,
    **contrastive.SHAPES,
    **masks.SHAPES,
    "nt_xent": _nt_xent,
    "nt_xent_backward": _nt_xent_backward,
    "clip_loss": _clip_loss,
    "clip_loss_backward": _clip_loss_backward,
    "siglip_loss": _siglip_loss,
    "siglip_pairs": _siglip_pairs,
    "similarity_logsumexp": _similarity_logsumexp,
    "similarity_logsumexp_backward": _similarity_logsumexp_backward,
    "nearest_neighbors": _nearest_neighbors,
    "kmeans_step": _kmeans_step,
    "nearest_k": _nearest_k,
    "gram_loss": _gram_loss,
    "koleo_neighbors": _koleo_neighbors,
    "koleo": _koleo,
    "sinkhorn_step": _sinkhorn_step,
    "sinkhorn_bias": _sinkhorn_bias,
    "sinkhorn": _sinkhorn,
    "sinkhorn_rows": _sinkhorn_rows,
    "sinkhorn_codes": _sinkhorn_codes,
    "prototype_cross_entropy": _prototype_cross_entropy,
    "prototype_head_cross_entropy": _prototype_head_cross_entropy,
    "prototype_head_usage": _prototype_head_usage,
    "prototype_head_usage_backward": _prototype_head_usage,
    "mean_entropy": _mean_entropy,
}
