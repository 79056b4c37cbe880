"""Losses over ranks inside of torch.compile: one operator, in which everything runs as it does outside.

What ranks say to each other decides shapes, on the host, and no graph could hold it. So under torch.compile a public
function that is given a group becomes a single operator of the graph: it calls the function, and at once its backward,
in which ranks have something to say as well; the gradients wait for the upstream gradient.

Batches that are known to be equal leave nothing to say: within `in_graph.equal_batches` the function itself is traced.
"""

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem import in_graph
from fastjem.functional import checks
from fastjem.functional.precision import in_float32, loss_dtype
from fastjem.ops import LIBRARY
from fastjem.ops.autograd import known, ops

P = ParamSpec("P")
R = TypeVar("R")

_FUNCTIONS: dict[str, Callable] = {}
_SHAPES: dict[str, Callable] = {}
_PACKED: dict[str, Callable] = {}
_HOST_NUMBERS = ("eps", "t_max", "hardness")  # which a function wants to know on the host: see `checks.host_number`

_KEY = torch._C.DispatchKey
_AUTOGRAD = (_KEY.AutogradFunctionality, _KEY.ADInplaceOrView)

LIBRARY.define("over_ranks(str call, Tensor[] inputs, bool[] wanted) -> (Tensor[], Tensor[])")


def over_ranks(
    shapes: Callable[..., Sequence[Sequence]] = lambda *_, **__: [()],
    packed: Callable[[list[Tensor]], object] = lambda results: results[0],
    differentiable: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a public function with a `group`, so that torch.compile takes it whole.

    Args:
        shapes: from the function's arguments to the shapes of its results, of which the first is the loss.
        packed: from the results to what the function returns.
        differentiable: the first result has gradients.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _FUNCTIONS[name] = function
        _SHAPES[name] = shapes
        _PACKED[name] = packed

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            if options.get("group") is None or not torch.compiler.is_compiling() or in_graph.active():
                return function(*args, **options)
            if options.get("reduction") == "none":
                checks.fail(name, "under torch.compile, with a group, reduction must be mean or sum", "'none'")
            return _in_one_operator(name, differentiable, args, options)

        return call

    return decorate


def _in_one_operator(name: str, differentiable: bool, args: tuple, options: dict):
    """The function's result, of which the first, the loss, is differentiable for all its tensors."""
    tensors: list[Tensor] = []
    plan = [name]
    for key, value in [*(("", value) for value in args), *options.items()]:
        plan.append(f"{key}={_placed(key, value, tensors)}")
    wanted = [differentiable and torch.is_grad_enabled() and x.requires_grad for x in tensors]
    constants = [x.detach() for x in tensors]
    results, gradients = ops.over_ranks("\n".join(plan), constants, wanted)
    if any(wanted):
        results = [known(name, results[0], tensors, gradients, [1.0] * len(tensors)), *results[1:]]
    return _PACKED[name](results)


def _placed(key: str, value: object, tensors: list[Tensor]) -> str:
    """How an argument is written down; a tensor's place is among the `tensors`, to which it goes."""
    if isinstance(value, float):  # a symbolic one becomes a tensor
        value = checks.number("torch.compile", key, value, None if key in _HOST_NUMBERS else tensors[0])
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor"
    if isinstance(value, (list, tuple)) and not any(isinstance(x, Tensor) for x in value):
        return f"{tuple(value)}"  # of numbers
    if isinstance(value, (list, tuple)):
        tensors.extend(value)
        return f"list {len(value)}"
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, str):
        return f"'{value}'"
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value}"
    if not isinstance(value, dist.ProcessGroup):
        checks.fail(
            "torch.compile", f"with a group, {key} must be a tensor, a number or a string", type(value).__name__
        )
    return f"group {value.group_name}"


def _arguments(plan: list[str], tensors: Sequence[Tensor]) -> tuple[list, dict]:
    """What `_placed` has written down."""
    from torch.distributed.distributed_c10d import _resolve_process_group as resolve

    rest = iter(tensors)
    args: list = []
    options: dict = {}
    for line in plan:
        key, written = line.split("=", 1)
        if written == "tensor":
            value: object = next(rest)
        elif written.startswith("list "):
            value = [next(rest) for _ in range(int(written[5:]))]
        elif written.startswith("torch."):
            value = getattr(torch, written[6:])
        elif written.startswith("group "):
            value = resolve(written[6:])  # pyright: ignore[reportArgumentType]
        else:
            value = ast.literal_eval(written)
        if key:
            options[key] = value
        else:
            args.append(value)
    return args, options


def _run(call: str, inputs: list[Tensor], wanted: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    name, *plan = call.split("\n")
    leaves = [
        # float32 at least, as a gradient in half precision would be scaled after it is rounded
        in_float32(x.detach()).clone().requires_grad_() if want else x.detach()
        for x, want in zip(inputs, wanted, strict=True)
    ]
    args, options = _arguments(plan, leaves)
    gradients = [x.new_empty(0) for x in leaves]
    asked = [i for i, want in enumerate(wanted) if want]
    with _recording(any(wanted)):
        results = list(_flat(_FUNCTIONS[name](*args, **options)))
        if asked:
            found = torch.autograd.grad(results[0], [leaves[i] for i in asked], allow_unused=True)
            for i, gradient in zip(asked, found, strict=True):
                gradients[i] = torch.zeros_like(leaves[i]) if gradient is None else gradient
    shaped = _shaped(name, args, options, inputs)
    values = [x.detach().to(dtype).clone() for x, (_, dtype) in zip(results, shaped, strict=True)]
    return values, _apart(gradients)


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """Contiguous, none a part of another's memory: two views' gradients may be halves of one tensor, and a graph may
    write over what an operator returns."""
    taken: set[int] = set()
    apart: list[Tensor] = []
    for gradient in gradients:
        address = gradient.untyped_storage().data_ptr()
        shared = address in taken
        taken.add(address)
        apart.append(gradient.clone(memory_format=torch.contiguous_format) if shared else gradient.contiguous())
    return apart


@contextlib.contextmanager
def _recording(wanted: bool) -> Iterator[None]:
    """Autograd records: inside of an operator it is off in two ways, by its mode and by its place in the dispatcher."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        torch.set_grad_enabled(wanted),
    ):
        yield


def _flat(results: object) -> Sequence[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    assert isinstance(results, tuple)
    return [x for part in results for x in _flat(part)]


def _shaped(name: str, args: list, options: dict, inputs: list[Tensor]) -> list[tuple[Sequence, torch.dtype]]:
    """Shapes and dtypes of the results."""
    dtype = options.get("dtype") or loss_dtype(inputs[0])
    return [(shape, dtype) for shape in _SHAPES[name](*args, **options)]


def _fake(call: str, inputs: list[Tensor], wanted: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    name, *plan = call.split("\n")
    args, options = _arguments([line for line in plan if "=group " not in line], inputs)
    results = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in _shaped(name, args, options, inputs)]
    gradients = [
        x.new_empty(x.shape, dtype=loss_dtype(x)) if want else x.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    ]
    return results, gradients


LIBRARY.impl("over_ranks", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastjem::over_ranks", _fake, lib=LIBRARY)
