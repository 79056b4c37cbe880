# The C++ extension, csrc/bindings.cpp. Its functions take addresses, sizes and threads, which the launchers check;
# here every name is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
