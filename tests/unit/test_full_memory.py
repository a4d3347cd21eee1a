"""Which errors say that a GPU's memory is full, and what is said of them."""

from __future__ import annotations

import pytest

from tasks.engines.device import full_memory_in_log, out_of_memory

TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.06 MiB is free."
)
TOO_LITTLE_FREE = (
    "Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory utilization "
    "(0.5, 39.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
# What vLLM writes at every start.
ENOUGH_FREE = (
    "INFO 11-23 09:12:40 [gpu_worker.py:678] Free memory on device (78.1/79.2 GiB) on startup. Desired GPU memory "
    "utilization is (0.5, 39.6 GiB). Actual usage is 0.93 GiB for weight."
)


@pytest.mark.parametrize(
    ("said", "full"),
    [
        (TORCH, True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        (TOO_LITTLE_FREE, True),
        ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", True),
        ("Memory usage increased after sleeping.", True),
        ("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:139", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("The size of tensor a must match the size of tensor b", False),
    ],
)
def test_what_frameworks_say_of_full_memory(said: str, full: bool) -> None:
    assert (out_of_memory(RuntimeError(said)) is not None) is full


def test_the_reason_is_found_behind_an_error_and_told_with_what_to_do() -> None:
    try:
        try:
            raise RuntimeError(TORCH + " Of the allocated memory" * 100)
        except RuntimeError as error:
            raise ValueError("The engine did not start.") from error
    except ValueError as error:
        told = str(out_of_memory(error))
    assert TORCH in told and len(told) < 900
    assert "Lower packed_sequence_length" in told and "The same command continues" in told


@pytest.mark.parametrize(
    ("line", "full"),
    [
        ("[rank0]: AssertionError: Memory usage increased after sleeping.", True),
        (f"(EngineCore pid=71) ERROR 11-23 09:12:40 [core.py:1136] ValueError: {TOO_LITTLE_FREE}", True),
        (f"[rank0]: torch.OutOfMemoryError: {TORCH}", True),
        ("  what():  CUDA error: out of memory", True),
        (ENOUGH_FREE, False),
        ("WARNING Lower gpu_memory_utilization where the GPU gets out of memory.", False),
        ("[rank0]: RuntimeError: CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_the_log_of_a_process_says_of_full_memory(line: str, full: bool) -> None:
    log = f"INFO The first line.\n{line}\n[rank0]:[W1123 ProcessGroupNCCL.cpp:1575] Warning: not destroyed\n"
    told = full_memory_in_log(log)
    assert (told is not None) is full
    assert told is None or f"({line.strip()[:400]})" in str(told)
