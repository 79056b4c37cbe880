"""What the arguments of losses that are whole in one operator must be: see kernels/shapes.py."""

import torch

from ..arithmetic import compute_dtype, widest_dtype
from ..expect import alike, expect, same_width
from .of_views import state_rows


def _nt_xent_of_views(views, weights, learned, *_):
    op = "nt_xent_of_views"
    alike(op, "views", *views, dims=4 - len(views), rows=True)
    v, n = views[0].shape[:2] if len(views) == 1 else (2, len(views[0]))
    expect(op, "weights", weights, (v, n))
    expect(op, "learned", learned, ())


def _nt_xent_of_views_backward(upstream, unit, divisors, lse, state, factor, weights, learned, *_):
    op = "nt_xent_of_views_backward"
    alike(op, "unit", unit, dims=3, rows=True)
    wide = widest_dtype(unit.device)
    for name, x in (("divisors", divisors), ("lse", lse)):
        expect(op, name, x, unit.shape[:2], wide)
    expect(op, "weights", weights, unit.shape[:2])
    for name, x in (("upstream", upstream), ("factor", factor), ("learned", learned)):
        expect(op, name, x, (), wide if x is factor else None)
    expect(op, "state", state, (2, state_rows(unit.shape[0] * unit.shape[1])), torch.float32)


def _supcon(z, ids, learned, *_):
    alike("supcon", "z", z, dims=3, rows=True)
    expect("supcon", "ids", ids, z.shape[1:2], torch.int64)
    expect("supcon", "learned", learned, ())


def _supcon_backward(upstream, unit, divisors, lse, table, state, factor, learned, *options):
    op = "supcon_backward"
    _, _, normalize, *_ = options
    alike(op, "unit", unit, dims=3, rows=True)
    wide = widest_dtype(unit.device)
    if normalize:
        expect(op, "divisors", divisors, unit.shape[:2], wide)
    expect(op, "lse", lse, unit.shape[:2], wide)
    for name, x in (("upstream", upstream), ("factor", factor), ("learned", learned)):
        expect(op, name, x, (), wide if x is factor else None)
    rows = state_rows(unit.shape[0] * unit.shape[1])
    expect(op, "table", table, (2, rows), torch.int32)
    expect(op, "state", state, (3, rows), torch.float32)


def _clip_loss_of_pairs(x, y, learned, *_):
    alike("clip_loss_of_pairs", "x and y", x, y, rows=True)
    expect("clip_loss_of_pairs", "learned", learned, ())


def _clip_loss_of_pairs_backward(upstream, x, y, learned, logit_scale, of_pairs, state, *_):
    op = "clip_loss_of_pairs_backward"
    alike(op, "x and y", x, y, rows=True)
    expect(op, "upstream", upstream, ())
    expect(op, "learned", learned, ())
    expect(op, "of_pairs", of_pairs, (3, x.shape[0]), widest_dtype(x.device))
    expect(op, "state", state, (2, 2, state_rows(x.shape[0])), torch.float32)


def _info_nce(query, positive, negatives, learned, *_):
    op = "info_nce"
    alike(op, "query and positive", query, positive, rows=True)
    same_width(op, "query and negatives", query, negatives)
    expect(op, "negatives", negatives, negatives.shape, query.dtype)
    expect(op, "learned", learned, ())


def _info_nce_backward(
    upstream, of_query, of_positive, slopes, unit, of_rows, others, divisors, state, factor, learned, *options
):
    op = "info_nce_backward"
    *_, n, _, wanted = options
    wide = widest_dtype(factor.device)
    for name, x in (("upstream", upstream), ("factor", factor), ("learned", learned)):
        expect(op, name, x, (), wide if x is factor else None)
    for name, x, want in (("of_query", of_query, wanted[0]), ("of_positive", of_positive, wanted[1])):
        if want:
            alike(op, name, x)
            expect(op, name, x, (n, x.shape[1]), compute_dtype(x.dtype))
    if wanted[0] and wanted[1]:
        expect(op, "of_positive", of_positive, of_query.shape)
    if wanted[3]:
        expect(op, "slopes", slopes, (n,), wide)
    if wanted[2]:
        alike(op, "others", others)
        expect(op, "unit", unit, (n, others.shape[1]), others.dtype)
        expect(op, "of_rows", of_rows, (2, n), wide)
        expect(op, "divisors", divisors, others.shape[:1], wide)
        expect(op, "state", state, (2, state_rows(n)), torch.float32)
        for name, x, want in (("of_query", of_query, wanted[0]), ("of_positive", of_positive, wanted[1])):
            if want:
                expect(op, name, x, unit.shape)


def _siglip_loss_of_pairs(x, y, learned_scale, learned_bias, *_):
    op = "siglip_loss_of_pairs"
    alike(op, "x and y", x, y, rows=True)
    expect(op, "learned_scale", learned_scale, ())
    expect(op, "learned_bias", learned_bias, ())


def _siglip_loss_of_pairs_backward(upstream, sums, derivatives, learned_scale, learned_bias, _, dtype, wanted):
    op = "siglip_loss_of_pairs_backward"
    needed = [x for x, want in zip(sums, wanted, strict=False) if want]
    if needed:
        alike(op, "sums", *needed, rows=True)
        expect(op, "sums", needed[0], needed[0].shape, compute_dtype(dtype))
    expect(op, "derivatives", derivatives, (2,), widest_dtype(derivatives.device))
    for name, x in (("upstream", upstream), ("learned_scale", learned_scale), ("learned_bias", learned_bias)):
        expect(op, name, x, ())


def _normalize_rows(rows, _):
    alike("normalize_rows", "rows", rows)


def _normalize_rows_backward(gradient, unit, divisors, *_):
    op = "normalize_rows_backward"
    alike(op, "gradient and unit", gradient, unit)
    expect(op, "unit", unit, unit.shape, compute_dtype(unit.dtype))
    expect(op, "divisors", divisors, unit.shape[:1], widest_dtype(unit.device))


SHAPES = {
    "normalize_rows": _normalize_rows,
    "normalize_rows_backward": _normalize_rows_backward,
    "clip_loss_of_pairs": _clip_loss_of_pairs,
    "clip_loss_of_pairs_backward": _clip_loss_of_pairs_backward,
    "info_nce": _info_nce,
    "info_nce_backward": _info_nce_backward,
    "siglip_loss_of_pairs": _siglip_loss_of_pairs,
    "siglip_loss_of_pairs_backward": _siglip_loss_of_pairs_backward,
    "supcon": _supcon,
    "supcon_backward": _supcon_backward,
    "nt_xent_of_views": _nt_xent_of_views,
    "nt_xent_of_views_backward": _nt_xent_of_views_backward,
}
