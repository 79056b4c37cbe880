"""Losses on scores against prototypes (SwAV, DINO, iBOT, MSN), and Sinkhorn, which balances them."""

from ..table import Operator

OPERATORS = {
    "sinkhorn_step": Operator(
        "(Tensor scores, Tensor? bias, float epsilon, Tensor? rows=None, Tensor? log_floors=None) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "sinkhorn_rows": Operator("(Tensor scores, Tensor bias, float epsilon) -> Tensor", cpu=True, gpu=True),
    "sinkhorn_bias": Operator(
        "(Tensor[] scores, float epsilon, int iterations, bool normalize_samples_first, Tensor? rows=None) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "sinkhorn": Operator(
        "(Tensor scores, float epsilon, int iterations, bool normalize_samples_first, ScalarType dtype) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "sinkhorn_codes": Operator(
        "(Tensor scores, Tensor bias, float epsilon, ScalarType dtype) -> Tensor", cpu=True, gpu=True
    ),
    "prototype_cross_entropy": Operator(
        "(Tensor[] student, Tensor[] teacher, float student_temperature,"
        " float teacher_temperature, Tensor? teacher_bias, str pairs, Tensor? weights, bool statistics, bool[] wanted)"
        " -> (Tensor, Tensor[], Tensor, Tensor[])",
        cpu=True,
        gpu=True,
    ),
    "prototype_head_cross_entropy": Operator(
        "(Tensor[] inputs, Tensor[] teacher, Tensor teacher_prototypes,"
        " float student_temperature, float teacher_temperature, Tensor? teacher_bias, str pairs, Tensor? weights,"
        " bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
    "prototype_head_usage": Operator(
        "(Tensor[] inputs, Tensor[] teacher, Tensor teacher_prototypes, float student_temperature,"
        " float teacher_temperature, Tensor? teacher_bias, str pairs) -> (Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "prototype_head_usage_backward": Operator(
        "(Tensor[] inputs, Tensor[] teacher, Tensor teacher_prototypes, float student_temperature,"
        " float teacher_temperature, Tensor? teacher_bias, str pairs, Tensor upstream, Tensor? slope, bool[] wanted)"
        " -> Tensor[]",
        cpu=True,
        gpu=True,
    ),
    "mean_entropy": Operator(
        "(Tensor[] scores, float temperature, Tensor? total, Tensor? rows, bool[] wanted)"
        " -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
}
