"""What PyTorch takes of a GPU in each step: told by the process that trains, read by the bench."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_MEMORY = "memory.jsonl"


def tell(folder: Path, step: int) -> None:
    """Add a line to the folder's file, in 10⁹ bytes; its peak is of the time since the last one."""
    if not torch.cuda.is_available():
        return
    row = {
        "step": step,
        "allocated_gb": round(torch.cuda.memory_allocated() / 1e9, 3),
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "reserved_gb": round(torch.cuda.memory_reserved() / 1e9, 3),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
    }
    with (folder / _MEMORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    torch.cuda.reset_peak_memory_stats()


def told(folder: Path) -> dict[int, dict[str, float]]:
    """Return what was told in a folder, by step."""
    return {int(row.pop("step")): row for row in whole_lines(folder / _MEMORY)}


def whole_lines(path: Path) -> list[dict[str, float]]:
    """Return the whole lines of a file that another process writes."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]
