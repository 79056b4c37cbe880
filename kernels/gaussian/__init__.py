"""Sums for tests of normality along directions: the empirical characteristic function, of which SIGReg consists."""

from ..table import Operator

OPERATORS = {
    "characteristic": Operator("(Tensor theta, int frequencies) -> Tensor", cpu=True, gpu=True),
    "characteristic_backward": Operator("(Tensor theta, Tensor weights) -> Tensor", cpu=True, gpu=True),
}
