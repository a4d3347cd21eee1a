"""Use of processor, memory, disk, network and GPU while a run is on, among the run's metrics in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL_S = 10.0
"""A training of a few minutes gets a curve of some dozen points, one of a day a few thousand."""
PREFIX = "system/"
"""What the names of these metrics begin with; their x axis counts samples, not policy updates."""


@contextmanager
def system_metrics(run_id: str, tracking_uri: str) -> Iterator[None]:
    """Record what the machine does, in a thread, until the context is left; a reopened run's curves go on.

    `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` overrides the interval. A GPU is among it where `nvidia-ml-py` is
    installed. Once MLflow does not answer, the curves end; nothing is raised.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=INTERVAL_S, resume_logging=True, tracking_uri=tracking_uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
