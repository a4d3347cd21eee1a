"""How busy a GPU is and how much of its memory is taken, asked of nvidia-smi while something else runs."""

from __future__ import annotations

import subprocess
import threading
import time

QUERY = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
PAUSE_S = 0.25


class GpuWatch(threading.Thread):
    """A context manager that asks several times a second, for all GPUs together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rows: list[tuple[float, int, float]] = []
        """`time.time()`, MiB taken on all GPUs, and their mean busy share in percent."""
        self._stopped = threading.Event()

    def __enter__(self) -> GpuWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Ask until the block ends."""
        while not self._stopped.wait(PAUSE_S):
            answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
            gpus = [[int(figure) for figure in line.split(",")] for line in answer.splitlines()]
            busy = sum(share for _, share in gpus) / len(gpus)
            self.rows.append((time.time(), sum(memory for memory, _ in gpus), busy))

    def busy(self, since: float, until: float) -> float | None:
        """Return the busy share from 0 to 1 between two moments, None where nobody looked."""
        shares = [busy for at, _, busy in self.rows if since <= at <= until]
        return round(sum(shares) / len(shares) / 100, 3) if shares else None

    def peak_gb(self, since: float, until: float) -> float | None:
        """Return the most memory taken between two moments, in 10⁹ bytes, None where nobody looked."""
        taken = [memory for at, memory, _ in self.rows if since <= at <= until]
        return round(max(taken) * 2**20 / 1e9, 2) if taken else None
