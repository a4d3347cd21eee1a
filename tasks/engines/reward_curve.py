"""The reward curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.titles.metric_names import TRAIN_REWARD, VAL_REWARD_MEAN

_TRAIN, _VAL, _BASE = "#9fb8d9", "#d95f02", "#6b7280"
WINDOW = 5
"""Steps that the smoothed lines are a mean of."""


def draw_reward_curve(
    history: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, best_step: int | None = None
) -> bool:
    """Draw training and validation reward over steps into a PNG; return False where there is nothing to draw.

    `history` holds (step, value) pairs by metric name. The dashed line is the validation reward at step 0,
    which is the base model's.
    """
    train, val = history.get(TRAIN_REWARD, []), history.get(VAL_REWARD_MEAN, [])
    if not train and not val:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A figure of its own, without pyplot: no global state, no window system.
    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, rewards = zip(*train, strict=True)
        axes.plot(steps, rewards, color=_TRAIN, linewidth=1, label="training, each step")
        axes.plot(steps, smoothed(rewards), color="#1f5fa8", linewidth=2, label=f"training, mean of {WINDOW} steps")
    if val:
        steps, rewards = zip(*val, strict=True)
        axes.plot(steps, rewards, color=_VAL, linewidth=2, marker="o", markersize=6, label="validation")
        if steps[0] == 0:
            axes.axhline(rewards[0], color=_BASE, linestyle="--", linewidth=1, label="base model (validation, step 0)")
        best = dict(val).get(best_step) if best_step is not None else None
        if best is not None and best_step is not None:
            axes.annotate(
                f"best: {best:.2f} at step {best_step}",
                (best_step, best),
                xytext=(0, 14),
                textcoords="offset points",
                ha="right" if best_step > max(steps) / 2 else "left",
                fontweight="bold",
                color=_VAL,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
            )
    axes.set_xlabel("step (policy updates)")
    axes.set_ylabel("mean reward (predicted log upvotes; 0 if unsupported)")
    axes.set_title("Reward of the policy's titles", loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Under the axes, where it covers no line.
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
    return True


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and up to four before it."""
    windows = [values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
