"""What a call would have a GPU do, counted without one: Triton's launches, torch's, and waits of the host.

Tensors lie in the host's memory and say that they are on "cuda:0", so code takes the way that it takes there; what is
made within and isn't asked for on a device is the host's, as ever. Every operator of fastjem goes to its Triton
launcher, whose launches are noted and don't happen: results are zeros. So nothing may depend on values; an operator
that asks for one of the GPU's is a wait.

A launch of torch is a kernel, a fill or a copy. Operators that have a CUDA kernel count as KERNELS says; those that
torch composes of others are taken apart by torch's own composition, one that isn't CUDA's.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from fastjem.kernels import launch
from fastjem.ops import OPERATORS, direct, plain, triton_launcher

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")

# Of memory alone, beside views, which their schema tells.
NO_LAUNCH = {"empty", "empty_strided", "lift_fresh", "resize_", "set_", "record_stream", "_unsafe_view"}
# Their host waits: for a size of the result, an error code, or the number itself.
WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "multinomial", "_linalg_eigh", "_linalg_svd", "_linalg_check_errors",
}  # fmt: skip
# CUDA's kernels for an operator, at least, where that is more than one (torch 2.11, ATen/native/cuda).
KERNELS = {
    "_local_scalar_dense": 1,  # the copy
    "eye": 2,  # zeros, the diagonal
    "sort": 3,  # numbers of the columns, a copy, the sort in place; longer rows take more
    "topk": 2,
    "median": 2,
    "linalg_cholesky_ex": 3,  # a copy, cuSOLVER, the triangle
    "cholesky_inverse": 3,
    "linalg_solve_triangular": 2,
    "_linalg_eigh": 5,
    "_linalg_svd": 5,
    "_linalg_slogdet": 14,  # a copy, cuSOLVER; the permutation's sign 6, that of the diagonal 3, the logarithms' sum 3
    "linalg_lu_solve": 2,
    "addmm": 2,  # a copy of the summand, the product
    "baddbmm": 2,
}
# multi_tensor_apply's limits of tensors, by how many lists there are (depth_to_max_tensors), and of blocks of elements.
MOST_TENSORS = (110, 64, 48, 36, 30)
MOST_BLOCKS, BLOCK = 320, 65_536
# Functions of torch that make a tensor, and methods that may bring one to another device.
FROM_NUMBERS = ("tensor", "as_tensor", "asarray")
LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
FACTORIES = (
    *FROM_NUMBERS, *LIKE, "empty", "empty_strided", "zeros", "ones", "full", "arange", "linspace", "logspace", "eye",
    "rand", "randn", "randint", "randperm", "from_numpy", "scalar_tensor", "tril_indices", "triu_indices",
)  # fmt: skip
METHODS = ("to", "cpu", "cuda", "tolist", "pin_memory", "new_tensor")
COMPOSED = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class Launches(TorchDispatchMode):
    """`triton` and `torch`: how often each kernel or operator was launched; `waits`: what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: Counter[str] = Counter()
        self.torch: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.on_host = WeakIdKeyDictionary()
        self.makes_on_host = False  # within a call of torch that makes a tensor without a device

    @property
    def total(self) -> int:
        return self.triton.total() + self.torch.total()

    def __str__(self) -> str:
        parts = {"Triton": self.triton, "torch": self.torch, "waits": self.waits}
        return "; ".join(f"{name} {sum(of.values())} {dict(of)}" for name, of in parts.items())

    def is_host(self, x: Tensor) -> bool:
        return x in self.on_host

    def made_on_host(self, made: Any) -> Any:
        for x in _tensors(made):
            self.on_host[x] = True
        return made

    def launched(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, device_of: Any, **meta: Any) -> None:
        launch.check_grid(grid)
        name = getattr(kernel, "fn", kernel).__name__
        self.triton[name] += 1

    def copied(self, name: str, waits: bool = True) -> None:
        """Between the host's memory and the GPU's; pageable memory is copied while the host waits."""
        self.torch[name] += 1
        if waits:
            self.waits[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        given = _tensors((args, kwargs))
        if self.makes_on_host if not given else all(map(self.is_host, given)):
            return self.made_on_host(func(*args, **kwargs))
        if namespace == "fastjem":
            return self._operator(name, func, args, kwargs)
        if name not in NO_LAUNCH and _is_view(func) and _has(func, "CompositeImplicitAutograd"):
            with self:  # `to` and `contiguous`, which copy or don't
                return func.decompose(*args, **kwargs)
        if name in NO_LAUNCH or _is_view(func):
            result = func(*args, **kwargs)
            return result.zero_() if name.startswith("empty") else result  # an index, for one, has to be one
        if not given and not any("Tensor" in str(returned.type) for returned in func._schema.returns):
            return func(*args, **kwargs)  # about dtypes
        if name == "copy_":
            return self._copy(func, *args, **kwargs)
        composition = None if _has(func, "CUDA") or name == "scalar_tensor" else _composition(func)
        if composition is not None:
            with self:
                return composition(*args, **kwargs)
        if func._overloadname in ("dtype", "dtype_out"):  # float32 sums of half-precision products: CUDA's alone
            result = kwargs.get("out")
            if result is None:
                result = torch.zeros(*args[0].shape[:-1], args[1].shape[-1], dtype=args[2])
        else:
            result = func(*args, **kwargs)
        in_place = kwargs.get("out") is not None and kwargs["out"] is args[0]
        self._note(f"{name}_" if in_place else name, args, kwargs, result)
        return result

    def _operator(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """One of fastjem's: its launcher, or its composition of others; what that does with torch is counted, too."""
        with self:
            if not OPERATORS[name].gpu:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            implementation = triton_launcher(name)[0]
            assert implementation is not None and not kwargs
            return plain(implementation, name)(*args)

    def _copy(self, func: Any, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if to.numel():
            between = self.is_host(to) != self.is_host(source)
            self.copied("copy_", waits=between and not non_blocking)
        return func(to, source, non_blocking)

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        made = _tensors(result)
        for x in _tensors((args, kwargs)):
            if self.is_host(x) and x.dim():  # an index, say; a single number is an argument of the kernel
                self.copied("copy_")
        if _waits(name, args, kwargs):
            self.waits[name] += 1
        if made and not any(x.numel() for x in made):
            return
        self.torch[name] += _of_lists(args, made) if name.startswith(("_foreach", "_fused")) else KERNELS.get(name, 1)
        if name in ("index_put", "_index_put_impl_") and (kwargs.get("accumulate") or (len(args) > 3 and args[3])):
            self.torch[name] += 5  # places are sorted first


class _Devices:
    """What is asked for on the GPU is made in the host's memory, and noted which of the two it stands for."""

    def __init__(self, found: Launches) -> None:
        self.found = found

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        where = property(lambda x: HOST if self.found.is_host(x) else GPU)
        properties = {
            "device": where,
            "is_cuda": property(lambda x: x.device == GPU),
            "is_cpu": property(lambda x: x.device == HOST),
        }
        with contextlib.ExitStack() as inside:
            for name in FACTORIES:
                inside.enter_context(mock.patch.object(torch, name, self._factory(getattr(torch, name))))
            methods = {name: getattr(self, f"_{name}")(getattr(Tensor, name)) for name in METHODS}
            for name, of in (properties | methods).items():
                inside.enter_context(mock.patch.object(Tensor, name, of))
            yield

    def _factory(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Of tensors that lie where `device` says, else where a tensor lies which they are to be like, else here."""

        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            found = self.found
            given = _tensors(args)
            on_host = all(map(found.is_host, given)) if device is None else torch.device(device).type == "cpu"
            if make.__name__ in FROM_NUMBERS and not on_host:
                if given and not found.is_host(given[0]):
                    return make(*args, **kwargs)
                found.copied(make.__name__)
            before = found.makes_on_host
            found.makes_on_host = on_host
            try:
                result = make(*args, **kwargs)
            finally:
                found.makes_on_host = before
            return found.made_on_host(result) if on_host else result

        return made

    def _to(self, to: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            like = [GPU for other in _tensors((args, kwargs)) if not self.found.is_host(other)]
            devices = [torch.device(of) for of in (*args, *kwargs.values()) if _is_device(of)] + like
            if devices:
                args, kwargs = tree_map(lambda of: HOST if _is_device(of) else of, (args, kwargs))
            result = to(x, *args, **kwargs)
            if not devices or (devices[0].type == "cpu") == self.found.is_host(x):
                return result
            return self._across(x, result, waits=not kwargs.get("non_blocking"))

        return moved

    def _across(self, x: Tensor, result: Tensor, waits: bool = True) -> Tensor:
        """A copy of x in the other memory."""
        was_host = self.found.is_host(x)
        self.found.copied("copy_", waits)
        with _disable_current_modes():
            result = result.clone()
        return result if was_host else self.found.made_on_host(result)

    def _cpu(self, _: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: x if self.found.is_host(x) else self._across(x, x)

    def _cuda(self, _: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def moved(x: Tensor, device: Any = None, non_blocking: bool = False) -> Tensor:
            return self._across(x, x, waits=not non_blocking) if self.found.is_host(x) else x

        return moved

    def _tolist(self, tolist: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def read(x: Tensor) -> Any:
            if not self.found.is_host(x):
                self.found.copied("tolist")
            return tolist(x)

        return read

    def _pin_memory(self, _: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *_: x

    def _new_tensor(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.found.is_host(x):
                return self.found.made_on_host(make(x, *args, **kwargs))
            self.found.copied("new_tensor")
            return make(x, *args, **kwargs)

        return made


def _is_device(x: Any) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in ("cpu", "cuda"))


def _tensors(of: Any) -> list[Tensor]:
    return [x for x in tree_iter(of) if isinstance(x, Tensor)]


def _has(func: Any, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _composition(func: Any) -> Any:
    """How torch composes an operator of others; None where it doesn't."""
    if _has(func, "CompositeImplicitAutograd"):
        return func.decompose
    if func._overloadname == "Scalar" and _has(getattr(func._overloadpacket, "Tensor", func), "CUDA"):
        return None  # the same kernel, of a number
    for key in COMPOSED:
        if _has(func, key):
            return lambda *args, **kwargs: func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
    return None


def _is_view(func: Any) -> bool:
    returned = [x.alias_info for x in func._schema.returns]
    return bool(returned) and all(x is not None and not x.is_write for x in returned)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the host waits for the GPU; an index that is a mask is as long as it has true elements."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    masks = name in ("index", "index_put", "_index_put_impl_") and any(
        x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])
    )
    return masks or name in WAITS


def _of_lists(args: Any, made: list[Tensor]) -> int:
    """Launches of an operator on lists of tensors."""
    lists = [x for x in (*args, made) if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    count = len(lists[0])
    blocks = sum(-(-x.numel() // BLOCK) for x in lists[0])
    return max(1, -(-count // MOST_TENSORS[min(len(lists), 5) - 1]), -(-blocks // MOST_BLOCKS))


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """What happens within, forward and backward: backward runs on this thread, as tensors are the host's."""
    found = Launches()
    with (
        direct.off(),
        mock.patch.object(launch, "launch", found.launched),
        mock.patch.object(launch, "capturing", lambda device: False),
        warnings.catch_warnings(),
        _Devices(found).patched(),
        found,
    ):
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")
        yield found
