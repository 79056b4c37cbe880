"""What happens to weights and gradients around every loss: the momentum average, the scale of gradients."""

from ..table import Operator

OPERATORS = {
    "rescale_": Operator("(Tensor(a!) gradient, Tensor factor) -> ()", cpu=True, gpu=True),
    "rescale_all_": Operator("(Tensor(a!)[] gradients, Tensor upstream, Tensor scale) -> ()", cpu=True, gpu=True),
    "ema_update_": Operator("(Tensor(a!)[] teacher, Tensor[] student, Tensor momentum) -> ()", cpu=True, gpu=True),
}
