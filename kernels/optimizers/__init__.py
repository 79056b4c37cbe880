"""Optimisers of all parameters at once, each with the momentum copy of the network (the teacher) in the same pass.

What the operators take, beside lists of tensors with one tensor a parameter:

* `teachers` may be fewer: those of the first parameters. `buffers` of LARS may be none, which is SGD without momentum.
* `settings` [G, S] float64: a row of numbers for each group of parameters, whose columns `columns.py` names. They are
  read where the parameters are, so that a schedule needs no synchronisation, and a CUDA graph follows it.
* `groups`: for each parameter its row of `settings`.
* `grad_scale`, `found_inf`: 0-dim, a GradScaler's. Gradients are divided by the one; where the other isn't 0 parameters
  and averages stay as they are, and the teacher follows all the same, as `ema_update_` behind a skipped step does.

A parameter, its averages and its teacher are of one dtype, float32 or float64; gradients may be half precision.
"""

from ..table import Operator

OPERATORS = {
    "lars_norms": Operator(
        "(Tensor[] parameters, Tensor[] gradients, Tensor settings, int[] groups, Tensor? grad_scale) -> Tensor",
        cpu=True, gpu=True,
    ),
    "lars_": Operator(
        "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] buffers, Tensor(c!)[] teachers, Tensor settings, "
        "int[] groups, Tensor? norms, Tensor? grad_scale, Tensor? found_inf) -> ()",
        cpu=True, gpu=True,
    ),
    "adamw_": Operator(
        "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] averages, Tensor(c!)[] squares, "
        "Tensor(d!)[] steps, Tensor(e!)[] teachers, Tensor settings, int[] groups, Tensor? grad_scale, "
        "Tensor? found_inf) -> ()",
        cpu=True, gpu=True,
    ),
}  # fmt: skip
