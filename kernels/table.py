"""What a family's `__init__.py` says of each operator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """One operator. The specification, a function of the operator's name, is in the family's `reference.py`."""

    schema: str  # torch.library's, without the name
    cpu: bool = False  # whether the family's `cpu.py` has a function of that name, which calls C++
    gpu: bool = False  # whether its `gpu.py` has one, which launches Triton kernels
    tiles: tuple[str, ...] = ()  # of "cpu" and "cuda", where these call no kernel but torch's products of tiles
