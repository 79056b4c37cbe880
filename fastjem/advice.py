"""What to do about errors that come from the machine and not from the program: one line for each kind."""

import re

SHARED_MEMORY = (
    "the loader's workers ran out of shared memory (/dev/shm): give it more (docker run --shm-size=2g), take fewer "
    "--workers, or none: --workers 0"
)
KILLED = (
    "a worker of the loader was killed, most often by the system for want of memory: take fewer --workers, or none: "
    "--workers 0"
)
DESCRIPTORS = "this process may not open so many files: raise the limit (ulimit -n 65536), or take fewer --workers"
HUNG_UP = (
    "a worker of the loader couldn't hand over a batch: open files (ulimit -n) or memory don't suffice; take fewer "
    "--workers, or none: --workers 0"
)
PROCESSES = "no further process or thread may be started here: take fewer --workers, or raise the limit (ulimit -u)"
GPU_MEMORY = (
    "the GPU's memory is full: --micro-batch 64 takes the same batch through the encoder 64 images at a time; else "
    "halve --batch-size and set --accumulate 2, or take a smaller --image-size or --backbone"
)
HOST_MEMORY = (
    "memory is full: take fewer --workers; --micro-batch 64 takes the same batch through the encoder 64 images at a "
    "time; else halve --batch-size and set --accumulate 2, or take a smaller --image-size or --backbone"
)
OTHER_RANK = "another rank has ended, and this one with it; what that one printed says why"

# What torch, Python and the system say -> the advice; the first that fits. "Cannot allocate memory" of a worker is
# memory, "No space left on device" of one is /dev/shm, the only place where the loader writes.
KINDS = (
    (r"shared memory|shm_open|/torch_\d+|Bus error", SHARED_MEMORY),
    (r"(?s)DataLoader worker process.*No space left on device", SHARED_MEMORY),
    (r"Too many open files|items of ancdata", DESCRIPTORS),
    (r"CUDA out of memory|HIP out of memory|CUDA error: out of memory|STATUS_ALLOC_FAILED", GPU_MEMORY),
    (r"[Cc]an(no|')t allocate memory|not enough memory|bad_alloc|Unable to allocate .*array", HOST_MEMORY),
    (r"DataLoader worker.*(exited unexpectedly|killed by signal)", KILLED),
    (r"can't start new thread|Resource temporarily unavailable", PROCESSES),
    (r"Connection (closed|reset) by peer|Broken pipe.*gloo|remote process exited", OTHER_RANK),
)


def advice(error: BaseException) -> str | None:
    """What to do about it, in a line; None for an error of another kind, which is the program's and needs its trace."""
    if not isinstance(error, (MemoryError, RuntimeError, OSError, EOFError)):
        return None
    if isinstance(error, OSError) and _raised_in("multiprocessing.synchronize", error):
        return SHARED_MEMORY  # a semaphore, which is a file of /dev/shm; Linux says nothing of it in the error's text
    text = str(error)
    for pattern, line in KINDS:
        if re.search(pattern, text):
            return line
    if isinstance(error, (EOFError, ConnectionError)) and _raised_in("multiprocessing", error):
        return HUNG_UP
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module doesn't import
        return GPU_MEMORY
    return HOST_MEMORY if isinstance(error, MemoryError) else None


def _raised_in(package: str, error: BaseException) -> bool:
    """Whether a module of the package has raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(package)
