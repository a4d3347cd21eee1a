"""Which GPUs and ports of the machine a process gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from tasks.titles.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(ids: Sequence[int]) -> dict[str, str]:
    """Return the environment variable that shows a process the GPUs of `ids` alone.

    Ids count the GPUs that this process may use, from 0. Raises `ConfigError` for one that it may not.
    """
    shown = os.environ.get(VISIBLE)
    if shown is None:
        return {VISIBLE: ",".join(map(str, ids))}
    names = [name.strip() for name in shown.split(",") if name.strip()]
    missing = [number for number in ids if number >= len(names)]
    if missing:
        raise ConfigError(
            f"The profile names GPU {missing[0]}, but {VISIBLE}={shown} shows {len(names)}, numbered from 0. Name "
            "one of them, or show more."
        )
    return {VISIBLE: ",".join(names[number] for number in ids)}


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
