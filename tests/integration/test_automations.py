"""The automations on a real Prefect server: a killed run becomes Crashed, and somebody is told of what fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import get_current_settings
from prefect.states import Pending

from flows.deploy import WEBHOOK_BLOCK, apply_plan
from flows.deployment_plan import Plan, read_automations
from flows.job_templates import HEARTBEAT

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]

SOON = 10
"""Prefect waits ten seconds at least; the file's values leave time for three heartbeats, and for a node to start."""
PATIENCE_S, ATTEMPTS = 60, 3
# It has the name of a flow that the automations watch.
HANG = """
import time
from prefect import flow
from prefect.runtime import flow_run

@flow(name="train")
def hang():
    print(flow_run.id, flush=True)
    time.sleep(600)

hang()
"""


@flow(name="evaluate", flow_run_name="quoted", retries=0)
def fail() -> None:
    """Fail with a message that is not easily put into JSON."""
    raise ValueError('"quoted",\nin two lines \\ and with a backslash')


@flow(name="somebody-elses")
def fail_elsewhere() -> None:
    """Fail as a flow that is none of ours."""
    raise ValueError("not ours")


@flow(name="compare")
def succeed() -> str:
    """Complete."""
    return "done"


@pytest.fixture
def told() -> Iterator[tuple[str, list[str]]]:
    """An address, and the texts that were sent to it."""
    texts: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/told", texts
    server.shutdown()
    server.server_close()


@pytest.fixture
async def applied(told: tuple[str, list[str]]) -> AsyncIterator[list[str]]:
    """The automations on the server, those that give a run up as impatient as can be; what they tell."""
    address, texts = told
    automations = read_automations()
    for automation in automations:
        if automation["actions"][0]["type"] == "change-flow-run-state":
            automation["trigger"]["within"] = SOON
    await apply_plan(Plan(work_pools=[], deployments=[]), automations, webhook_url=address)
    yield texts
    async with get_client() as client:
        for automation in automations:
            for found in await client.read_automations_by_name(automation["name"]):
                await client.delete_automation(found.id)
    await Webhook.adelete(WEBHOOK_BLOCK)


async def killed_run(folder: Path) -> FlowRun:
    """Start a flow in a process of its own, kill that, and return the run as the server has it then."""
    script = folder / "hang.py"
    script.write_text(HANG, encoding="utf-8")
    environment = {**os.environ, **HEARTBEAT, "PREFECT_API_URL": str(get_current_settings().api.url)}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        run_id = (await asyncio.to_thread(process.stdout.readline)).strip()
        # Its first heartbeat leaves when it starts, in batches.
        await asyncio.sleep(3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    async with get_client() as client:
        return await client.read_flow_run(run_id)


def missing(expected: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return those of `expected` that none of `texts` begins with."""
    return [words for words in expected if not any(text.startswith(words) for text in texts)]


async def test_runs_that_are_dead_become_crashed_and_failures_are_told_of(applied: list[str], tmp_path: Path) -> None:
    assert succeed() == "done"
    told_of_crashes: set[str] = set()
    # Prefect's server loses an event now and then while its SQLite file is locked: then it all happens once more.
    for attempt in range(ATTEMPTS):
        for failing in (fail, fail_elsewhere):
            with pytest.raises(ValueError):
                failing()
        async with get_client() as client:
            taken = await client.create_flow_run(succeed, name=f"taken-{attempt}", state=Pending())
            killed = await killed_run(tmp_path)
            assert killed.state_type == StateType.RUNNING, "nobody was there to say that it is dead"
            expected = (
                "evaluate quoted: Failed",
                f"compare taken-{attempt}: Crashed",
                f"train {killed.name}: Crashed Its process is gone",
            )
            told_of_crashes |= set(expected[1:])
            for _ in range(PATIENCE_S):
                killed, taken = await client.read_flow_run(killed.id), await client.read_flow_run(taken.id)
                ended = {killed.state_type, taken.state_type} == {StateType.CRASHED}
                if ended and not missing(expected, applied):
                    break
                await asyncio.sleep(1)
        if not missing(expected, applied):
            break
    messages = [str(run.state.message) for run in (killed, taken) if run.state and run.state.is_crashed()]
    assert ["no heartbeat" in text for text in messages] == [True, False] and "has not started" in messages[1]
    assert missing(expected, applied) == []
    failed = [text for text in applied if text.startswith(expected[0])]
    assert all("'quoted', in two lines / and with a backslash" in text for text in failed)
    # Nobody else's, and each run's once.
    crashed = [
        next(words for words in told_of_crashes if text.startswith(words)) for text in applied if text not in failed
    ]
    assert len(crashed) == len(set(crashed))
