"""`gather_distributed` of the modules: the process group of all ranks, where there is one."""

import torch.distributed as dist


def check_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed needs torch.distributed, which this build of torch doesn't have")


def default_group(gather_distributed: bool) -> dist.ProcessGroup | None:
    if gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None
