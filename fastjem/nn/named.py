"""Errors name the module that the user called, and not the function or operator behind it.

What a module raises comes from the function that computes it (`nt_xent: z0 and z1 must be ...`), from a module within
it, or from torch. One wrapper around the methods of every public module puts the module's own name there. Nothing is
added to a graph of torch.compile, which is traced through the method itself.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

RENAMED = (ValueError, TypeError, RuntimeError, IndexError, AttributeError)


def name_errors(modules: Iterable[type[nn.Module]], others: Iterable[str]) -> None:
    """Make the errors of these modules begin with their names.

    Args:
        modules: whose own methods, but private ones, are wrapped in place.
        others: names that errors begin with and the user hasn't called: functions and parts of modules.
    """
    modules = list(modules)
    known = sorted({module.__name__ for module in modules} | set(others), key=len, reverse=True)
    prefix = re.compile(rf"(?<![\w.])(?:fastjem::)?(?:{'|'.join(map(re.escape, known))}): ")
    for module in modules:
        for name, method in list(vars(module).items()):
            if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
                setattr(module, name, _naming_errors(method, prefix))


def _naming_errors(method: Callable[..., Any], prefix: re.Pattern[str]) -> Callable[..., Any]:
    @functools.wraps(method)
    def named(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except RENAMED as error:
            _rename(error, type(self).__name__, prefix)
            raise

    return named


def _rename(error: Exception, name: str, prefix: re.Pattern[str]) -> None:
    """In place, so that the error's type, its traceback and what it was raised from stay as they are."""
    if isinstance(error, torch.OutOfMemoryError) or type(error).__module__.startswith("torch._dynamo"):
        return
    if len(error.args) != 1 or not isinstance(error.args[0], str):  # of several, the first needn't be the text
        return
    text = error.args[0]
    renamed, times = prefix.subn(f"{name}: ", text)
    if not times and not text.startswith(name):
        renamed = f"{name}: {text}"
    error.args = (renamed,)
