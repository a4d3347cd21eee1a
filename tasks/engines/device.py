"""What training and sampling compute on, in words."""

from __future__ import annotations

from typing import Literal

from tasks.engines.cpu.cores import usable_cores


def device_name(device: Literal["cpu", "cuda"]) -> str:
    """Return the GPU's name, or how many CPU cores this process may use."""
    if device == "cpu":
        return f"{usable_cores()} CPU cores"
    import torch

    return torch.cuda.get_device_name()
