"""What a checkpoint remembers of its run, and whether a request may continue from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.engines.contract import TrainingRequest
from tasks.titles.config import NEUTRAL_SETTINGS
from tasks.titles.cursor import Cursor, stories_fingerprint
from tasks.titles.errors import CheckpointError

# These do not change what a step computes: a run may be continued with other values of them.
MAY_CHANGE = NEUTRAL_SETTINGS | {"max_steps", "test_stories", "heldout_reward_model"}


@dataclass(frozen=True)
class TrainingState:
    """Everything besides weights that the next step depends on; `cursor.json` in the checkpoint's folder."""

    cursor: Cursor
    run_name: str
    profile: Mapping[str, Any]
    """The resolved profile, as plain values."""
    mlflow_run_id: str
    best_step: int
    best_reward: float
    """`val/reward/mean` of `best_step`."""
    seconds: float
    """Wall clock of training so far, over all sittings."""
    trajectories_dropped: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the cursor's own at the top level."""
        return {
            **self.cursor.to_json(),
            "run_name": self.run_name,
            "profile": dict(self.profile),
            "mlflow_run_id": self.mlflow_run_id,
            "best_step": self.best_step,
            "best_reward": self.best_reward,
            "seconds": self.seconds,
            "trajectories_dropped": self.trajectories_dropped,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainingState:
        """Read `to_json`'s values; raise `CheckpointError` naming what is missing."""
        try:
            return TrainingState(
                cursor=Cursor.from_json(values),
                run_name=str(values["run_name"]),
                profile=dict(values["profile"]),
                mlflow_run_id=str(values["mlflow_run_id"]),
                best_step=int(values["best_step"]),
                best_reward=float(values["best_reward"]),
                seconds=float(values["seconds"]),
                trajectories_dropped=int(values["trajectories_dropped"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint's cursor.json is not usable ({type(error).__name__}: {error}). It was not written by "
                "this project, or was edited: start the run under another name."
            ) from error


def data_fingerprint(request: TrainingRequest) -> str:
    """Return the fingerprint of the training and the validation stories, in their order."""
    train, val = ([prompt.story.id for prompt in prompts] for prompts in (request.train, request.val))
    return stories_fingerprint([f"{len(train)} training stories", *train, *val])


def first_state(request: TrainingRequest, mlflow_run_id: str) -> TrainingState:
    """Return the state before the first step."""
    return TrainingState(
        cursor=Cursor(seed=request.profile.seed, fingerprint=data_fingerprint(request)),
        run_name=request.run_name,
        profile=request.profile.model_dump(mode="json"),
        mlflow_run_id=mlflow_run_id,
        best_step=0,
        best_reward=float("-inf"),
        seconds=0.0,
        trajectories_dropped=0,
    )


def check_continues(state: TrainingState, request: TrainingRequest) -> None:
    """Check that `request` continues the run whose last complete checkpoint holds `state`.

    Raises `CheckpointError` naming everything that differs.
    """
    differences = []
    if state.run_name != request.run_name:
        differences.append(f"the checkpoint is of run '{state.run_name}', this is run '{request.run_name}'")
    wanted = request.profile.model_dump(mode="json")
    for key in sorted((wanted.keys() | state.profile.keys()) - MAY_CHANGE):
        before, now = state.profile.get(key), wanted.get(key)
        if before != now:
            differences.append(f"{key} was {before!r} and is {now!r}")
    if state.cursor.fingerprint != data_fingerprint(request):
        differences.append("the training or validation stories are others, or in another order")
    if differences:
        raise CheckpointError(
            f"{request.run_dir} holds checkpoint {state.cursor.step} of a run that this one does not continue: "
            + "; ".join(differences)
            + ". Give the same settings and stories to continue it, or start under another run name."
        )
