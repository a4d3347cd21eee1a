"""Calibration as a picture: what was predicted against what came, by decile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tasks.reward_training.quality import Quality
from tasks.titles.story import Split

_COLOURS: dict[Split, str] = {"train": "#9fb8d9", "val": "#d95f02", "test": "#1f5fa8"}


def draw_calibration(figures: Mapping[Split, Quality], path: Path) -> None:
    """Draw each split's deciles into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no global state, no window system.
    figure = Figure(figsize=(6.5, 6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends = []
    for split, found in figures.items():
        predicted = [decile.predicted for decile in found.deciles]
        observed = [decile.observed for decile in found.deciles]
        ends += predicted + observed
        name = f"{split} ({found.stories} stories, RMSE {found.rmse:.2f})"
        axes.plot(predicted, observed, color=_COLOURS[split], linewidth=2, marker="o", markersize=5, label=name)
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#6b7280", linestyle="--", label="as predicted")
    axes.set_xlabel("mean prediction of a decile (log upvotes)")
    axes.set_ylabel("mean of what its stories got (log upvotes)")
    axes.set_title("Calibration of the reward model", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(path)
