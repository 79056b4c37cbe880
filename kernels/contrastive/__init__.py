"""Losses on the similarities of rows: NT-Xent and its kin, InfoNCE, CLIP, SigLIP, nearest neighbours, KoLeo.

* `composed.py`: what the log-sum-exp losses are composed of, and the `Engine` that computes tiles of similarities.
* `visible.py`: log-sum-exps over what each row sees, of which losses with options are made, and `VisibleEngine`.
* `cpu_engine.py`: the engine on the CPU; torch.mm makes tiles, C++ works on them. `cpu_visible.py`: its part for
  `visible.py`. `cpu.py`: the operators.
* `one_tile.py`, `seen_tile.py`, `class_tile.py`: losses on the CPU whose similarities fit one tile, which is kept; the
  latter two with options. `small.py`: losses of a few rows in one call.
* `gpu_engine.py`: the engine on a GPU, of Triton kernels on `tiles.py`: `sums.py` (log-sum-exps), `weights.py`
  (gradients), `rows.py` (single rows). `gpu.py`: the operators.
* `of_views.py`: the specification of NT-Xent as one loss, of a batch that is on one rank. `cpu_views.py` computes it
  with the engine; `gpu_views.py` and `views.py` in as few launches as there can be. For CLIP's loss those are
  `of_pairs.py`, `cpu_pairs.py`, `gpu_pairs.py` and `pair_kernels.py`, for InfoNCE `of_queries.py`, `cpu_queries.py`,
  `gpu_queries.py` and `query_kernels.py`, for SigLIP's CLIP's first two and `gpu_sigmoid.py`, with `cpu_sigmoid.py` for
  its sums over pairs, for SupCon's `of_classes.py`, `cpu_classes.py`, `gpu_classes.py` and `class_kernels.py`.
* `rows.py` has the rows of unit length as well that losses with options are made of.
"""

from ..table import Operator

OPERATORS = {
    "nt_xent": Operator(
        "(Tensor rows, Tensor candidates, SymInt offset, float temperature, bool decoupled, bool normalize)"
        " -> (Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "nt_xent_backward": Operator(
        "(Tensor rows, Tensor candidates, Tensor rows_lse, Tensor candidates_lse, Tensor? weights,"
        " SymInt offset, float temperature, bool decoupled, bool normalize) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "nt_xent_of_views": Operator(
        "(Tensor[] views, Tensor? weights, Tensor? learned, float temperature, bool decoupled)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "nt_xent_of_views_backward": Operator(
        "(Tensor upstream, Tensor unit, Tensor divisors, Tensor lse, Tensor state, Tensor factor, Tensor? weights,"
        " Tensor? learned, float temperature, bool decoupled, ScalarType dtype, bool[] wanted) -> (Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "supcon": Operator(
        "(Tensor z, Tensor? ids, Tensor? learned, float temperature, bool one_anchor, bool normalize)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "supcon_backward": Operator(
        "(Tensor upstream, Tensor unit, Tensor divisors, Tensor lse, Tensor table, Tensor state, Tensor factor,"
        " Tensor? learned, float temperature, bool one_anchor, bool normalize, ScalarType dtype, bool[] wanted)"
        " -> (Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "info_nce": Operator(
        "(Tensor query, Tensor positive, Tensor negatives, Tensor? learned, SymInt offset, float temperature,"
        " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "info_nce_backward": Operator(
        "(Tensor upstream, Tensor of_query, Tensor of_positive, Tensor slopes, Tensor unit, Tensor of_rows,"
        " Tensor others, Tensor divisors, Tensor state, Tensor factor, Tensor? learned, SymInt offset,"
        " float temperature, SymInt count, ScalarType dtype, bool[] wanted) -> Tensor[]",
        cpu=True,
        gpu=True,
    ),
    "clip_loss": Operator(
        "(Tensor x, Tensor y, Tensor logit_scale, SymInt offset) -> (Tensor, Tensor, Tensor)", cpu=True, gpu=True
    ),
    "clip_loss_backward": Operator(
        "(Tensor x, Tensor y, Tensor logit_scale, Tensor x_lse, Tensor y_lse, SymInt offset,"
        " bool[] wanted) -> (Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
    "clip_loss_of_pairs": Operator(
        "(Tensor x, Tensor y, Tensor? learned, float logit_scale) -> (Tensor, Tensor, Tensor)", cpu=True, gpu=True
    ),
    "clip_loss_of_pairs_backward": Operator(
        "(Tensor upstream, Tensor x, Tensor y, Tensor? learned, float logit_scale, Tensor of_pairs, Tensor state,"
        " bool[] wanted) -> (Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
    "siglip_loss": Operator(
        "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, SymInt offset, bool[] wanted)"
        " -> (Tensor, Tensor[], Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "siglip_loss_of_pairs": Operator(
        "(Tensor x, Tensor y, Tensor? learned_scale, Tensor? learned_bias, float logit_scale, float logit_bias,"
        " bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
    "siglip_loss_of_pairs_backward": Operator(
        "(Tensor upstream, Tensor[] sums, Tensor derivatives, Tensor? learned_scale, Tensor? learned_bias,"
        " float logit_scale, ScalarType dtype, bool[] wanted) -> (Tensor[], Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "similarity_logsumexp": Operator(
        "(Tensor a, Tensor b, SymInt[] own_image, Tensor? row_ids, Tensor? column_ids, Tensor? exclude,"
        " Tensor? row_limit, Tensor? column_limit, bool columns, bool totals, ScalarType products)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "similarity_logsumexp_backward": Operator(
        "(Tensor a, Tensor b, SymInt[] own_image, Tensor? row_ids, Tensor? column_ids, Tensor? exclude,"
        " Tensor? row_limit, Tensor? column_limit, Tensor? row_lse, Tensor? row_slope, Tensor? row_total_slope,"
        " Tensor? column_lse, Tensor? column_slope, Tensor? column_total_slope, bool[] wanted, ScalarType products)"
        " -> Tensor[]",
        cpu=True,
        gpu=True,
    ),
    "siglip_pairs": Operator(
        "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor label_smoothing, Tensor? weights,"
        " Tensor? row_ids, Tensor? column_ids, Tensor? positives, Tensor? exclude, SymInt offset, bool[] wanted)"
        " -> (Tensor, Tensor[], Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "normalize_rows": Operator("(Tensor rows, float eps) -> (Tensor, Tensor)", cpu=True, gpu=True),
    "normalize_rows_backward": Operator(
        "(Tensor gradient, Tensor unit, Tensor divisors, float eps, ScalarType dtype) -> Tensor", cpu=True, gpu=True
    ),
    "nearest_neighbors": Operator("(Tensor query, Tensor bank) -> Tensor", cpu=True, gpu=True),
    "koleo_neighbors": Operator(
        "(Tensor rows, Tensor candidates, SymInt offset, int topk, SymInt group_size, float eps) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "koleo": Operator(
        "(Tensor x, Tensor neighbors, float p, float eps, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
}
