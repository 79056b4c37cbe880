"""What subclasses of lightly's and open_clip's classes override, and what becomes of it here.

A fused loss never makes what some of those methods are given: logits, probabilities, codes. Where a subclass, or an
assignment to an instance, replaces such a method, `forward` takes the way through it, in plain torch. Where there is no
such way, the method would silently never be called: then the subclass itself is refused.
"""

from typing import Any, ClassVar

from torch import nn


class Hooks(nn.Module):
    """A module some of whose namesake's methods are honoured and some refused."""

    # Method of the namesake that is never called -> what to do instead.
    never_called: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, instead in cls.never_called.items():
            if name in vars(cls):
                base = next(base for base in cls.__mro__ if name in vars(base).get("never_called", {}))
                raise TypeError(f"{base.__name__}: nothing calls {name}, which {cls.__name__} overrides; {instead}")


def is_overridden(module: nn.Module, name: str, base: type) -> bool:
    """Whether the module's method `name` is another than that of the class `base`.

    Asked of the class, and not of the bound method: torch.compile makes those anew, and none is what it was.
    """
    return name in vars(module) or getattr(type(module), name) is not getattr(base, name)
