"""Which errors say that a GPU's memory is full, and what is said of them."""

from __future__ import annotations

import pytest

from tasks.engines.device import out_of_memory

TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.06 MiB is free."
)


@pytest.mark.parametrize(
    ("said", "full"),
    [
        (TORCH, True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory utilization", True),
        ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", True),
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
