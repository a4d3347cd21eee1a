"""The whole job: train a policy, then evaluate what came out."""

from __future__ import annotations

from prefect import flow

from flows.evaluate import evaluate_run
from flows.form import Overrides, ProfileName, RunName
from flows.train import train_titles
from tasks.titles.summary import Evaluation
from tasks.tracking import flow_run_label


@flow(name="run", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def run_titles(
    profile: ProfileName = "starter", overrides: Overrides = None, run_name: RunName = None, fresh: bool = False
) -> Evaluation:
    """Train a policy to write titles, then evaluate it on the test stories.

    Args:
        profile: name of a profile, or path of a .toml file
        overrides: settings that differ from the profile's, each `key=value`
        run_name: run to continue or to start; empty: the newest unfinished run of this very profile, or a new one
        fresh: start a new run even where one could be continued
    """
    name = await train_titles(profile, overrides, run_name, fresh)
    return await evaluate_run(name)
