# Triton's own annotations are of the language within kernels: `cdiv`, `next_power_of_2` and the launch of a kernel, called
# from Python, would come out as `constexpr`. To the type checker all of Triton is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
