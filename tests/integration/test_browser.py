"""What a person sees: the run's page in Prefect, its artifacts, and both engines beside each other in MLflow.

The pictures are kept in the folder that SCREENSHOTS names, else in pytest's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import CHROMIUM, Browser, open_browser
from daily_parts import ART, TRL, Office, Resumed, Trained, run_id

from tasks.engines.tracker import run_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = os.environ.get("SCREENSHOTS")
    return Path(asked) if asked else tmp_path_factory.mktemp("screenshots")


def test_the_runs_page_in_prefect(office: Office, trained: Trained, browser: Browser, pictures: Path) -> None:
    page = f"{office.service('prefect').address}/v2/runs/flow-run/{trained.flow_run}"
    browser.open(page, f"train-{ART}", "Completed", "12 Task runs", "Beginning flow run")
    browser.screenshot(pictures / "prefect-run.png")
    browser.scroll_to("Step 3 of 3: training reward")
    browser.open(f"{page}?tab=Artifacts", "training-figures", "validation-titles", "Step 3 of 3 · reward")
    browser.screenshot(pictures / "prefect-run-artifacts.png")


def test_the_log_of_the_trainers_process_is_on_the_runs_page(
    office: Office, resumed: Resumed, browser: Browser, pictures: Path
) -> None:
    page = f"{office.service('prefect').address}/v2/runs/flow-run/{resumed.flow_run}"
    browser.open(page, f"train-{TRL}", "Completed", "Beginning flow run")
    browser.screenshot(pictures / "prefect-run-trl.png")
    browser.scroll_to("ledger: Step 6 of 6: training reward")
    browser.screenshot(pictures / "prefect-run-trl-log.png")


def test_the_artifacts(office: Office, trained: Trained, browser: Browser, pictures: Path) -> None:
    prefect = office.service("prefect").address
    browser.open(f"{prefect}/v2/artifacts", "training-figures", "validation-titles", "stories")
    browser.screenshot(pictures / "prefect-artifacts.png")

    found = office.artifacts(trained.flow_run)
    where = f"{prefect}/v2/artifacts/artifact"
    shown = browser.open(f"{where}/{found['training-figures']['id']}", "Dropped trajectories: 0 of 36")
    assert "supported" in shown and "validation, step 0" in shown
    links = browser.evaluate("[...document.links].map(link => link.href)")
    assert (
        f"{office.service('mlflow').address}/#/experiments/1/runs/{run_id(office, ART)}?workflowType=machine_learning"
        in links
    )
    browser.screenshot(pictures / "prefect-training-figures.png")

    browser.open(f"{where}/{found['validation-titles']['id']}", "human title", "supported")
    assert browser.evaluate("document.querySelectorAll('tbody tr').length") == 4
    browser.screenshot(pictures / "prefect-validation-titles.png")


def test_the_compare_view_of_both_engines_in_mlflow(
    office: Office, trained: Trained, resumed: Resumed, browser: Browser, pictures: Path
) -> None:
    mlflow = office.service("mlflow").address
    browser.open(mlflow, "Experiments")
    # It opens by itself in a new browser, and would take a third of each picture.
    browser.evaluate("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
    browser.open(mlflow_page(office, ART), ART, "train/reward")
    browser.screenshot(pictures / "mlflow-run.png")

    runs = json.dumps([run_id(office, name) for name in (ART, TRL)])
    mode = "workflowType=machine_learning"
    asked = quote(f'runs={runs}&experiments=["1"]&{mode}', safe="=&")
    browser.open(f"{mlflow}/#/compare-runs?{asked}", ART, TRL, "Comparing 2 Runs from 1 Experiment")
    browser.screenshot(pictures / "mlflow-compare.png")
    browser.scroll_to("train/reward")
    browser.scroll_to("val/reward/mean")

    layout = 'plot_layout={"autosize":true,"xaxis":{},"yaxis":{}}&x_axis=step&y_axis_scale=linear&line_smoothness=1'
    metric = 'metric="train/reward"&plot_metric_keys=["train/reward"]&show_point=true'
    asked = quote(f'runs={runs}&{metric}&experiments=["1"]&{layout}&{mode}', safe="=&")
    browser.open(f"{mlflow}/#/metric?{asked}", "Comparing 2 Runs", ART, TRL, "(step=3)", "(step=6)")
    browser.screenshot(pictures / "mlflow-train-reward.png")


def mlflow_page(office: Office, run_name: str) -> str:
    return f"{office.service('mlflow').address}/{run_page('1', run_id(office, run_name))}"
