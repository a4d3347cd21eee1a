"""The GPUs of this machine, asked through NVIDIA's own library or program; nothing that computes is imported."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from dataclasses import dataclass

_TIMEOUT_S = 20.0
_FIELDS = "index,name,memory.total,memory.free,driver_version"
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs that the driver shows, or why there are none."""

    found: tuple[Gpu, ...]
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    """The newest CUDA that the driver runs."""
    problem: str | None = None


def find_gpus() -> Gpus:
    """Return the GPUs, through NVML where `nvidia-ml-py` is installed and through nvidia-smi else."""
    try:
        import pynvml
    except ImportError:
        return _by_program()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Gpus((), problem=f"NVIDIA's driver does not answer: {error}")
    try:
        return _by_library(pynvml)
    except pynvml.NVMLError as error:
        return Gpus((), problem=f"NVIDIA's driver does not answer: {error}")
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _by_library(nvml: object) -> Gpus:
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):  # type: ignore[attr-defined]
        handle = nvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
        found.append(Gpu(index, _text(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))  # type: ignore[attr-defined]
    version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # type: ignore[attr-defined]
    driver = _text(nvml.nvmlSystemGetDriverVersion())  # type: ignore[attr-defined]
    return Gpus(tuple(found), driver, (version // 1000, version % 1000 // 10), None if found else "no GPU is shown")


def _by_program() -> Gpus:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Gpus((), problem="no NVIDIA driver: nvidia-smi is not there")
    try:
        table = _run([program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"])
        head = _run([program])
    except (OSError, subprocess.SubprocessError) as error:
        return Gpus((), problem=f"NVIDIA's driver does not answer: nvidia-smi failed ({error})")
    return read_table(table, head)


def read_table(table: str, head: str) -> Gpus:
    """Return what nvidia-smi's lines of `index, name, total, free, driver` (MiB) and its page's head say."""
    found, driver = [], None
    for line in table.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and parts[0].isdigit() and parts[2].isdigit() and parts[3].isdigit():
            found.append(Gpu(int(parts[0]), parts[1], int(parts[2]) * MIB, int(parts[3]) * MIB))
            driver = parts[4]
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", head)
    return Gpus(
        tuple(found),
        driver,
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        None if found else "nvidia-smi shows no GPU",
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    return done.stdout


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
