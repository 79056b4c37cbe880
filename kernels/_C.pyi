# The C++ extension: csrc/bindings.cpp. Each function takes addresses, sizes and threads, and the launchers in cpu.py check
# them; here every name is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
