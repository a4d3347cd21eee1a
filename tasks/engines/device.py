"""What training and sampling compute on, and that its memory is full, in words."""

from __future__ import annotations

import re
from typing import Literal

from tasks.engines.cpu.cores import usable_cores
from tasks.titles.errors import OutOfMemory

# What PyTorch, the CUDA libraries and vLLM say; not all of them raise PyTorch's `OutOfMemoryError`. cuBLAS cannot be
# initialised where there is no room for its workspace. vLLM gives memory back and finds less of it free where another
# process has taken it.
_MEMORY_IS_FULL = re.compile(
    r"out of memory|STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|Memory usage increased after sleeping|"
    r"Free memory on device .* is less than desired|No available memory for the cache blocks"
)
# How an error is written to a log; vLLM also writes there how much memory was free, and of settings that would fill it.
_ERROR = re.compile(r"(?:[Ee]rror|Exception|what\(\)): ")
_DETAIL = 400  # characters; PyTorch goes on about its allocator


def device_name(device: Literal["cpu", "cuda"]) -> str:
    """Return the GPU's name, or how many CPU cores this process may use."""
    if device == "cpu":
        return f"{usable_cores()} CPU cores"
    import torch

    return torch.cuda.get_device_name()


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """Return what to raise where `error`, or what it comes from, says that the GPU's memory is full, else None."""
    behind: BaseException | None = error
    while behind is not None:
        for line in str(behind).splitlines():
            if _MEMORY_IS_FULL.search(line):
                return _full(line)
        behind = behind.__cause__ or behind.__context__
    return None


def full_memory_in_log(written: str) -> OutOfMemory | None:
    """Return what to raise where an error in a log says that the GPU's memory is full, else None."""
    for line in written.splitlines():
        if _ERROR.search(line) and _MEMORY_IS_FULL.search(line):
            return _full(line)
    return None


def _full(said: str) -> OutOfMemory:
    return OutOfMemory(
        f"The GPU's memory is full ({said.strip()[:_DETAIL]}). Lower packed_sequence_length, max_prompt_tokens (with "
        "TRL trl.micro_batch) or the engine's vllm_memory_share, or end other processes on that GPU. The same command "
        "continues from the last checkpoint."
    )
