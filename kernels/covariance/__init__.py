"""Losses on the covariance of columns: Barlow Twins and VICReg."""

from ..table import Operator

OPERATORS = {
    "barlow_twins": Operator(
        "(Tensor z0, Tensor z1, float lambda_param, int statistics, bool[] wanted)"
        " -> (Tensor, Tensor[], Tensor, Tensor[])",
        cpu=True,
        gpu=True,
    ),
    "vicreg": Operator(
        "(Tensor z0, Tensor z1, float lambda_param, float mu_param, float nu_param, float eps,"
        " int statistics, bool[] wanted) -> (Tensor, Tensor[], Tensor, Tensor[])",
        cpu=True,
        gpu=True,
    ),
}
