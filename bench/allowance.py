"""How much memory a process may take, and which error means that it was too little."""

import resource

import psutil

from bench.machine import usable_memory_mib

OUT_OF_MEMORY = 77
"""Exit status of a process that ran out of it, where there is no better way to tell."""


def free_mib() -> int:
    """Memory that this process and its children may fill, the cgroup's limit considered.

    A sixteenth of what is free stays so: if others took it meanwhile, the kernel would kill somebody, perhaps them.
    """
    available: int = psutil.virtual_memory().available
    return min(usable_memory_mib(), available // 2**20) * 15 // 16


def limit(mib: int) -> None:
    """Let an allocation past `mib` of data fail in this process, instead of taking the machine down."""
    resource.setrlimit(resource.RLIMIT_DATA, (mib * 2**20, mib * 2**20))


def limit_gpu(mib: int) -> None:
    """Let the CUDA allocator of this process hold no more than `mib` of the current device."""
    import torch

    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, mib * 2**20 / total))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is an out-of-memory error and no other: PyTorch raises a bare RuntimeError for a CPU allocation."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
