# Triton annotates its language: what Python calls (`cdiv`, `next_power_of_2`, the launch of a kernel) would come out as
# `constexpr`. To the type checker all of Triton is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
