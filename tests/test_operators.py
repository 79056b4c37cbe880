"""The raw operators: schema, fake kernel and mutation as PyTorch's opcheck sees them; and what bad input is told."""

import importlib
import importlib.util
import re

import pytest
import torch
from conftest import _C
from view_tables import view_table

import fastjem.functional as F
from fastjem import kernels, ops
from fastjem.kernels.augment import columns


def sample_arguments(device: str) -> dict[str, tuple]:
    g = torch.Generator().manual_seed(0)

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device)

    labels = torch.tensor([0, 3, -100, 6], device=device)
    pictures = torch.randint(256, (3, 5, 6, 3), generator=g, dtype=torch.uint8).to(device)
    return {
        "rescale_": (x(5, 7), x(1)[0]),
        "rescale_all_": ([x(5, 7), x(3)], x(1)[0], x(1)[0]),
        "ema_update_": ([x(5), x(3, 4)], [x(5), x(3, 4)], torch.tensor(0.9, dtype=torch.float64, device=device)),
        "lars_norms": ([x(5), x(3, 4)], [x(5), x(3, 4)], x(2, 10).double(), [1, 0], x(1)[0]),
        "lars_": (
            [x(5), x(3, 4)],
            [x(5), x(3, 4)],
            [x(5), x(3, 4)],
            [x(5)],
            x(2, 10).double(),
            [1, 0],
            x(2, 2).double().abs(),
            x(1)[0],
            None,
        ),
        "adamw_": (
            [x(5), x(3, 4)],
            [x(5), x(3, 4)],
            [x(5), x(3, 4)],
            [x(5).abs(), x(3, 4).abs()],
            [x(1)[0].abs(), x(1)[0].abs()],
            [x(5)],
            x(2, 6).double().sigmoid(),
            [1, 0],
            None,
            x(1)[0],
        ),
        "cross_entropy": (x(4, 7), labels, -100, [True]),
        "cross_entropy_rows": (x(4, 7), labels, x(4), x(1)[0] / 10, -100, [True]),
        "negative_cosine": (x(4, 7), x(4, 7), 1e-8, [True, False]),
        "regression": (x(4, 7), x(4, 7), 2.0, True, 1e-5, [True]),
        "regression_rows": (
            x(4, 7),
            x(4, 7),
            torch.tensor([2, 0], device=device),
            x(2).abs(),
            2.0,
            True,
            1e-5,
            [True],
        ),
        "gram_loss": (x(2, 4, 7), x(2, 4, 7), True, "clamp", [True]),
        "kmeans_step": (x(9, 7), x(3, 7), True, True),
        "nearest_k": (x(4, 7), x(9, 7), 3),
        "nt_xent": (x(2, 4, 7), x(2, 9, 7), 3, 0.5, False, True),
        "nt_xent_backward": (x(2, 4, 7), x(2, 9, 7), x(2, 4).double(), x(2, 9).double(), x(2, 9), 3, 0.5, True, False),
        "nt_xent_of_views": ([x(5, 7), x(5, 7)], x(2, 5), None, 0.5, False),
        "nt_xent_of_views_backward": (
            x(1)[0],
            x(3, 4, 7),
            x(3, 4).double().abs() + 1,
            x(3, 4).double() + 4,
            torch.zeros(2, 128, device=device),
            torch.tensor(2.0, dtype=torch.float64, device=device),
            None,
            torch.tensor(0.5, device=device),
            1.0,
            True,
            torch.float32,
            [True, True],
        ),
        "supcon": (x(2, 5, 7), torch.arange(5, device=device) // 2, x(1)[0].abs(), 0.5, False, True),
        "supcon_backward": (
            x(1)[0],
            x(3, 4, 7),
            x(3, 4).double().abs() + 1,
            x(3, 4).double() + 4,
            torch.tensor([[0, 1, 0, 1] * 3 + [-1] * 116, [5] * 12 + [0] * 116], dtype=torch.int32, device=device),
            torch.zeros(3, 128, device=device),
            torch.tensor(2.0, dtype=torch.float64, device=device),
            torch.tensor(0.5, device=device),
            1.0,
            False,
            True,
            torch.float32,
            [True, True],
        ),
        "info_nce": (x(4, 7), x(4, 7), x(9, 7), None, 5, 0.1, [True, True, False, False]),
        "info_nce_backward": (
            x(1)[0],
            x(4, 7),
            x(4, 7),
            x(4).double(),
            x(4, 7),
            x(2, 4).double().abs() + 1,
            x(9, 7),
            x(9).double().abs() + 1,
            torch.zeros(2, 128, device=device),
            torch.tensor(2.0, dtype=torch.float64, device=device),
            torch.tensor(0.5, device=device),
            5,
            1.0,
            4,
            torch.float32,
            [True, True, True, True],
        ),
        "clip_loss": (x(4, 7), x(9, 7), x(1)[0], 2),
        "clip_loss_backward": (x(4, 7), x(9, 7), x(1)[0], x(4).double(), x(9).double(), 2, [True, True]),
        "clip_loss_of_pairs": (x(4, 7), x(4, 7), x(1)[0], 1.0),
        "clip_loss_of_pairs_backward": (
            x(1)[0],
            x(4, 7),
            x(4, 7),
            x(1)[0],
            1.0,
            x(3, 4).double(),
            torch.zeros(2, 2, 128, device=device),
            [True, True, True],
        ),
        "siglip_loss": (x(4, 7), x(9, 7), x(1)[0], x(1)[0], 2, [True, False]),
        "siglip_loss_of_pairs": (x(4, 7), x(4, 7), None, x(1)[0], 5.0, 1.0, [True, False]),
        "siglip_loss_of_pairs_backward": (
            x(1)[0],
            [x(4, 7), x(4, 7)],
            x(2).double(),
            x(1)[0],
            None,
            1.0,
            torch.float32,
            [True, True, True, False],
        ),
        "siglip_pairs": (
            x(4, 7),
            x(9, 7),
            x(1)[0],
            x(1)[0],
            torch.tensor(0.1),
            x(4),
            torch.arange(4),
            torch.arange(9) % 4,
            None,
            x(4, 9) > 0.5,
            2,
            [True, False],
        ),
        "similarity_logsumexp": (
            x(4, 7),
            x(6, 7),
            [4, 1, 6],
            labels,
            labels[[0, 1, 2, 0, 1, 3]],
            x(4, 6) > 0,
            x(4),
            x(6),
            True,
            True,
            torch.float32,
        ),
        "similarity_logsumexp_backward": (
            x(4, 7),
            x(6, 7),
            [4, 1, 6],
            None,
            None,
            x(1, 6) > 0,
            x(4),
            None,
            x(4).double(),
            x(4).double(),
            None,
            x(6).double(),
            x(6).double(),
            x(6).double(),
            [True, True],
            torch.float32,
        ),
        "normalize_rows": (x(4, 7), 1e-12),
        "normalize_rows_backward": (x(4, 7), x(4, 7), x(4).double().abs(), 1e-12, torch.bfloat16),
        "nearest_neighbors": (x(4, 7), x(9, 7)),
        "sinkhorn_step": (x(4, 7), x(7), 0.05, labels[1], x(4)),
        "sinkhorn_rows": (x(4, 7), x(7), 0.05),
        "sinkhorn_bias": ([x(4, 7)], 0.05, 3, False, labels[1]),
        "sinkhorn": (x(4, 7), 0.05, 3, True, torch.bfloat16),
        "sinkhorn_codes": (x(4, 7), x(7), 0.05, torch.float32),
        "prototype_cross_entropy": (
            [x(4, 7)] * 3,
            [x(4, 7)] * 2,
            0.1,
            0.04,
            x(7),
            "different",
            None,
            True,
            [True, True, False],
        ),
        "prototype_head_cross_entropy": (
            [x(4, 5), x(4, 5), x(7, 5)],
            [x(4, 5)] * 2,
            x(7, 5),
            0.1,
            0.04,
            x(2, 7),
            "all",
            x(4).abs(),
            [True, False, True],
        ),
        "prototype_head_usage": (
            [x(4, 5), x(4, 5), x(7, 5)],
            [x(4, 5)] * 2,
            x(7, 5),
            0.1,
            0.04,
            x(2, 7),
            "all",
        ),
        "prototype_head_usage_backward": (
            [x(4, 5), x(4, 5), x(7, 5)],
            [x(4, 5)] * 2,
            x(7, 5),
            0.1,
            0.04,
            x(2, 7),
            "different",
            x(1)[0],
            x(7).double(),
            [True, False, True],
        ),
        "mean_entropy": ([x(4, 7)] * 2, 0.1, None, None, [True, True]),
        "koleo_neighbors": (x(4, 7), x(9, 7), 3, 2, 3, 1e-8),
        "koleo": (x(9, 7), torch.arange(18, device=device).reshape(9, 2) // 2, 2.0, 1e-8, [True]),
        "characteristic": (x(2, 4, 7), 3),
        "characteristic_backward": (x(2, 4, 7), x(2, 3, 2, 7)),
        "barlow_twins": (x(4, 7), x(4, 7), 5e-3, 2, [True, True]),
        "augment": (pictures, view_table(3).to(device), [0.5] * 3, [0.2] * 3, torch.bfloat16, True, False, 128.0),
        "crop_resize": (pictures, labels.clamp(0, 2), view_table(4).to(device), 4, True),
        "vicreg": (x(4, 7), x(4, 7), 25.0, 25.0, 1.0, 1e-4, 2, [True, False]),
        "keyed_uniform": (labels.clamp(0), None, 3, 1, 2, 3 << 30, 9, 2**40),
        "block_masks": (x(4, 22).sigmoid(), x(4).abs() * 9, 5, 6, 0.8, 0.1, 0.5, 2, 30, 0.3, 10),
        "even_block_scores": (x(4, 4 * 3 + 30).sigmoid(), 5, 6),
        "inverse_rectangle_masks": (x(4, 3).sigmoid(), 5, 6, 9, -0.7, 0.7),
        "multi_block_masks": (x(4, 2 * (2 + 3 * 4)).sigmoid(), 5, 6, [2, 2], [4, 4], 2, 5),
    }


@pytest.mark.parametrize("op", ops.OPERATORS)
def test_opcheck(op, implementation):
    arguments = sample_arguments(implementation.device)[op]
    torch.library.opcheck(getattr(torch.ops.fastjem, op).default, arguments)


X, Y = torch.zeros(3, 4), torch.zeros(5, 4)
LABELS = torch.zeros(3, dtype=torch.long)
PICTURES, MEAN = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), (0.5, 0.5, 0.5)
MISTAKES = [
    (lambda: F.cross_entropy(X[0], LABELS), "cross_entropy: logits must be [N, K], got (4,)"),
    (lambda: F.cross_entropy(X, LABELS[:2]), "cross_entropy: labels must be [3] int64, got (2,) torch.int64"),
    (lambda: F.cross_entropy(X, LABELS.int()), "cross_entropy: labels must be [3] int64, got (3,) torch.int32"),
    (
        lambda: F.cross_entropy(X.long(), LABELS),
        "cross_entropy: logits must be [N, K], floating-point, got torch.int64",
    ),
    (lambda: F.cross_entropy(X[:0], LABELS[:0]), "cross_entropy: logits must be [N, K], got (0, 4)"),
    (lambda: F.negative_cosine(X, Y), "negative_cosine: p and z must be [N, D] both, got (3, 4) and (5, 4)"),
    (lambda: F.negative_cosine(X, [1]), "negative_cosine: p and z must be [N, D] both, got list"),
    (lambda: F.negative_cosine(X, X, eps=0), "negative_cosine: eps must be a positive finite number, got 0"),
    (lambda: F.negative_cosine(X, X.to("meta")), "negative_cosine: tensors must be on one device, got cpu and meta"),
    (
        lambda: F.regression(X, Y),
        "regression: prediction and target must be [..., D] both, got (3, 4) and (5, 4)",
    ),
    (lambda: F.regression(X, X, beta=-1), "regression: beta must be at least 0 and finite, got -1"),
    (lambda: F.regression(X, X, rows=LABELS.int()), "regression: rows must be [M] int64, got (3,) torch.int32"),
    (
        lambda: F.regression(X, X, weights=X[0]),
        "regression: weights must be [3], floating-point, got (4,) torch.float32",
    ),
    (lambda: F.masked_rows(X), "masked_rows: mask must be [B, ...] bool, got (3, 4) torch.float32"),
    (lambda: F.masked_rows(X > 0, 13), "masked_rows: count must be at most the 12 patches, got 13"),
    (lambda: F.gram_loss(X, X), "gram_loss: student and teacher must be [B, P, D] both, got (3, 4) and (3, 4)"),
    (
        lambda: F.gram_loss(X[None], X[None], negatives="drop"),
        "gram_loss: negatives must be one of keep, clamp, clamp_teacher, got 'drop'",
    ),
    (lambda: F.gram_loss(X[None], X[None], level="all"), "gram_loss: level must be one of image, batch, got 'all'"),
    (lambda: F.kmeans(X, 4), "kmeans: clusters must be at most the rows, got 4 for 3 rows"),
    (lambda: F.kmeans(X, 0), "kmeans: clusters must be at least 1, got 0"),
    (lambda: F.kmeans(X, X[:, :3]), "kmeans: clusters must be K or [K, 4], got (3, 3)"),
    (lambda: F.kmeans(X, 2, init="best"), "kmeans: init must be one of random, k-means++, got 'best'"),
    (
        lambda: F.nearest_rows(X, X[:, :3], k=1),
        "nearest_rows: query must be [N, D], bank [M, D], got (3, 4) and (3, 3)",
    ),
    (lambda: F.nearest_rows(X, Y, k=0), "nearest_rows: k must be at least 1, got 0"),
    (
        lambda: F.knn_votes(X, Y, LABELS, classes=2),
        "knn_votes: labels must be [5] int64, got (3,) torch.int64",
    ),
    (
        lambda: F.simdino([X], [X]),
        "simdino: student and teacher must be [S, B, D] and [T, B, D], or lists of [B, D], S >= T, got 1 and 1 views",
    ),
    (lambda: F.koleo(X, topk=3), "koleo: topk must be less than the number of rows that see each other, got 3 and 3"),
    (lambda: F.koleo(X, group_size=2), "koleo: the number of rows must be a multiple of group_size, got 3 and 2"),
    (lambda: F.koleo(X, topk=0), "koleo: topk must be at least 1, got 0"),
    (lambda: F.sigreg(X, X), "sigreg: directions must be [4, S], got (3, 4)"),
    (lambda: F.nt_xent(X, Y), "nt_xent: z0 and z1 must be [N, D] both, got (3, 4) and (5, 4)"),
    (lambda: F.nt_xent(X), "nt_xent: z must be [V, N, D] with V >= 2, or two [N, D], got (3, 4)"),
    (lambda: F.nt_xent(X[None]), "nt_xent: z must be [V, N, D] with V >= 2, or two [N, D], got (1, 3, 4)"),
    (lambda: F.nt_xent(X, X, temperature=0), "nt_xent: temperature must be a positive finite number, got 0"),
    (lambda: F.nt_xent(X, X, reduction="all"), "nt_xent: reduction must be one of mean, sum, none, got 'all'"),
    (lambda: F.nt_xent(X, X, weights=torch.ones(4)), "nt_xent: weights must be [3] or [2, 3], got (4,)"),
    (lambda: F.nt_xent(X, X, ids=torch.ones(3)), "nt_xent: ids must be int64, got torch.float32"),
    (lambda: F.nt_xent(X, X, exclude=torch.ones(3, 3)), "nt_xent: exclude must be bool, got torch.float32"),
    (lambda: F.nt_xent(X, X, prior=1.0), "nt_xent: prior must be between 0 and 1, got 1.0"),
    (lambda: F.nt_xent(X, X, label_smoothing=2.0), "nt_xent: label_smoothing must be in [0, 1], got 2.0"),
    (
        lambda: F.nt_xent(X, X, hard_negatives=X),
        "nt_xent: hard_negatives must be [3, H, 4] with H >= 1, floating-point, got (3, 4)",
    ),
    (
        lambda: F.info_nce(X, X, Y, ids=torch.arange(3)),
        "info_nce: ids and negative_ids must be given both or neither, got one of them",
    ),
    (
        lambda: F.clip_loss(X, X, torch.ones(2)),
        "clip_loss: logit_scale must be a number or a 0-dim tensor, or [3], got (2,)",
    ),
    (
        lambda: F.info_nce(X, X, torch.zeros(7, 3)),
        "info_nce: query and positive must be [N, D] both, negatives [K, D], got (3, 4) and (7, 3)",
    ),
    (lambda: F.sinkhorn(torch.zeros(4)), "sinkhorn: scores must be [B, K] or [P, B, K], got (4,)"),
    (lambda: F.sinkhorn(X, iterations=-1), "sinkhorn: iterations must be at least 0, got -1"),
    (lambda: F.sinkhorn_bias(X, iterations=0), "sinkhorn_bias: iterations must be at least 1, got 0"),
    (
        lambda: F.sinkhorn_bias([X, Y], rows=LABELS[0]),
        "sinkhorn_bias: rows must be a 0-dim int64 tensor, for scores in one tensor, got () torch.int64 for 2",
    ),
    (
        lambda: F.sinkhorn_bias(X, rows=2),
        "sinkhorn_bias: rows must be a 0-dim int64 tensor, for scores in one tensor, got int for 1",
    ),
    (lambda: F.sinkhorn_bias(X, epsilon=-1), "sinkhorn_bias: epsilon must be a positive finite number, got -1"),
    (
        lambda: F.prototype_cross_entropy([X], [X], student_temperature=0.1, teacher_temperature=0.1),
        'prototype_cross_entropy: pairs="different" needs at least two views on one side, '
        "got one student and one teacher view",
    ),
    (
        lambda: F.prototype_cross_entropy([X], [X], student_temperature=0.1, teacher_temperature=0.1, pairs="any"),
        "prototype_cross_entropy: pairs must be one of different, same, all, got 'any'",
    ),
    (
        lambda: F.prototype_cross_entropy(
            [X], [X], student_temperature=0.1, teacher_temperature=0.1, pairs="all", teacher_bias=X[0, :2]
        ),
        "prototype_cross_entropy: teacher_bias must be [4] or [1, 4], got (2,)",
    ),
    (
        lambda: F.prototype_cross_entropy([X], [Y], student_temperature=0.1, teacher_temperature=0.1, pairs="all"),
        "prototype_cross_entropy: student and teacher must be [S, B, K] and [T, B, K], or lists of [B, K], "
        "got (3, 4) and (5, 4)",
    ),
    (
        lambda: F.barlow_twins(X[:1], X[:1]),
        "barlow_twins: z0 and z1 must have N >= 2 rows, as their variance is needed, got N = 1",
    ),
    (lambda: F.augment(X, Y, mean=MEAN, std=MEAN), "augment: images must be [B, H, W, C] uint8 or float32, got (3, 4)"),
    (
        lambda: F.augment(PICTURES.half(), Y, mean=MEAN, std=MEAN),
        "augment: images must be [B, H, W, C] uint8 or float32, got torch.float16",
    ),
    (
        lambda: F.augment(PICTURES.float(), view_table(2), mean=MEAN, std=MEAN, exact=True),
        "augment: images must be uint8 with exact=True, got torch.float32",
    ),
    (
        lambda: F.augment(PICTURES[..., :1], view_table(2), mean=MEAN, std=MEAN),
        "augment: mean and std must be 1 number each, std positive, got [0.5, 0.5, 0.5] and [0.5, 0.5, 0.5]",
    ),
    (
        lambda: F.augment(PICTURES, Y, mean=MEAN, std=MEAN),
        "augment: parameters must be [2, 13] float32, a row per image, got (5, 4)",
    ),
    (
        lambda: F.augment(PICTURES, view_table(2), mean=MEAN, std=MEAN, dtype=torch.int8),
        "augment: dtype must be float32, bfloat16 or float16, got torch.int8",
    ),
    (
        lambda: F.augment(PICTURES, view_table(2), mean=MEAN, std=(0, 1, 1)),
        "augment: mean and std must be 3 numbers each, std positive, got [0.5, 0.5, 0.5] and [0.0, 1.0, 1.0]",
    ),
    (
        lambda: F.crop_resize(PICTURES, LABELS.int(), view_table(3), size=4),
        "crop_resize: indices must be [B] int64, got (3,) torch.int32",
    ),
    (
        lambda: F.crop_resize(PICTURES, LABELS, view_table(3), size=0),
        "crop_resize: size must be at least 1, got 0",
    ),
    (
        lambda: F.crop_resize(PICTURES, LABELS, view_table(3), size=(4, 0)),
        "crop_resize: size must be at least 1, got 0",
    ),
    (
        lambda: F.crop_resize(PICTURES, LABELS, view_table(3), size=(4, 5, 6)),
        "crop_resize: size must be a number of pixels, or height and width, got (4, 5, 6)",
    ),
    (lambda: F.vicreg(X, Y), "vicreg: z0 and z1 must be [N, D] both, got (3, 4) and (5, 4)"),
    (lambda: F.ema_update_([X], [], 0.9), "ema_update_: teacher and student must be as many tensors, got 1 and 0"),
    (
        lambda: F.ema_update_([X, X], [X, Y], 0.9),
        "ema_update_: teacher and student must have the same shapes, got (3, 4) and (5, 4) at 1",
    ),
    (
        lambda: F.ema_update_([X.half()], [X], 0.9),
        "ema_update_: teacher must be float32 or float64 (half precision rounds updates away), student floating-point, "
        "got torch.float16 and torch.float32 at 0",
    ),
    (lambda: F.ema_update_([X], [X], 1.5), "ema_update_: momentum must be in [0, 1], got 1.5"),
    (lambda: F.ema_update_([X], [X], X), "ema_update_: momentum must be a number or a 0-dim tensor, got (3, 4)"),
]


@pytest.mark.parametrize("mistake, message", MISTAKES, ids=[message[:60] for _, message in MISTAKES])
def test_a_mistake_is_told_by_operator_contract_and_what_came(mistake, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mistake()


@pytest.mark.parametrize("op", ["cross_entropy"])
def test_a_label_out_of_range(op, implementation):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(implementation.device).requires_grad_()
    labels = torch.tensor([1, 7, -100], device=implementation.device)
    if implementation.name == "c++":
        with pytest.raises(ValueError, match=re.escape("labels must be in [0, 4) or ignore_index, got 7 at row 1")):
            F.cross_entropy(x, labels)
    else:
        loss = F.cross_entropy(x, labels)
        loss.backward()
        assert loss.isnan() and x.grad[1].isnan().all() and not x.grad[2].isnan().any()


@pytest.mark.parametrize("op", ["cross_entropy", "negative_cosine"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_values_end_and_stay_in_their_row(op, value, implementation):
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    y = x.flip(0)
    labels = torch.tensor([1, 7, 49, 0])
    x[2, 3] = value
    x, y, labels = (t.to(implementation.device) for t in (x, y, labels))
    x.requires_grad_()
    loss = F.cross_entropy(x, labels) if op == "cross_entropy" else F.negative_cosine(x, y)
    loss.backward()
    rows = torch.tensor([0, 1, 3], device=implementation.device)
    assert x.grad[rows].isfinite().all()
    if value == float("-inf") and op == "cross_entropy":  # a class ruled out: its probability is 0
        assert loss.isfinite() and x.grad.isfinite().all() and x.grad[2, 3] == 0
    else:
        assert not loss.isfinite()


def test_every_operator_has_an_implementation_everywhere():
    table = ops.implementations()
    assert set(table) == set(ops.OPERATORS)
    for op in ("ema_update_", "cross_entropy", "negative_cosine", "rescale_"):
        assert table[op]["cuda"] == "Triton"


def test_the_table_of_operators_is_what_the_families_have():
    for name, operator in ops.OPERATORS.items():
        assert callable(ops.reference(name))
        if _C:
            assert (ops.cpp_launcher(name)[0] is not None) == operator.cpu
        launcher, reason = ops.triton_launcher(name)
        assert (launcher is None) == bool(reason) and (operator.gpu or not launcher)


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_a_family_has_the_functions_that_its_table_names(family):
    operators = importlib.import_module(f"fastjem.kernels.{family}").OPERATORS
    for module, listed in (
        ("cpu", {n for n, o in operators.items() if o.cpu}),
        ("gpu", {n for n, o in operators.items() if o.gpu}),
    ):
        pytest.importorskip("triton" if module == "gpu" else "fastjem.kernels._C")
        if not importlib.util.find_spec(f"fastjem.kernels.{family}.{module}"):
            assert not listed
            continue
        functions = vars(importlib.import_module(f"fastjem.kernels.{family}.{module}"))
        assert {name for name in operators if callable(functions.get(name))} == listed


def test_python_and_cpp_name_the_same_columns_of_the_augmentation_table():
    of_python = {name: value for name, value in vars(columns).items() if name.isupper() and isinstance(value, int)}
    assert sorted(of_python.values()) == list(range(columns.COLUMNS + 1))  # the columns, and how many they are
    if _C is None:
        pytest.skip("no C++ extension")
    assert _C.augment_columns() == of_python
