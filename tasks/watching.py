"""What a flow run's page in Prefect shows of a training while it is on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from prefect.artifacts import Artifact, MarkdownArtifact, ProgressArtifact, TableArtifact
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.runtime import flow_run

from tasks.engines.contract import Progress, ProgressListener
from tasks.engines.ledger import VALIDATION
from tasks.engines.resume import journal_of
from tasks.titles.run_directory import RunDirectory
from tasks.titles.training_progress import headline, report, title_table

logger = logging.getLogger(__name__)


@asynccontextmanager
async def training_page(
    run: RunDirectory, links: Sequence[str], listener: ProgressListener
) -> AsyncIterator[ProgressListener]:
    """Keep three artifacts of the present flow run up to date: progress, figures, and the last validation's titles.

    Yields what is to hear of every step; it tells `listener` too. `links` are lines of Markdown to end the figures
    with. Prefect hears of steps in the background: a slow or absent server delays no training, and what it does not
    take is logged and sent with the next step.
    """
    page = _TrainingPage(run, links)

    def on_progress(progress: Progress) -> None:
        listener(progress)
        page.add(progress)

    async with get_client() as client:
        await page.send(client)
        sender = asyncio.create_task(page.send_news(client))
        try:
            yield on_progress
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender
        # Not where the run was cancelled or failed: its end is not to wait for this.
        await page.send(client)


async def name_after(run: RunDirectory) -> None:
    """Give the present flow run the name of its run, which it may have found only now."""
    name = f"{flow_run.flow_name}-{run.name}"
    if flow_run.id is None or flow_run.name == name:
        return
    try:
        async with get_client() as client:
            await client.update_flow_run(UUID(flow_run.id), name=name)
    except Exception as error:
        logger.warning("Prefect did not rename the flow run: %s", error)


class _TrainingPage:
    def __init__(self, run: RunDirectory, links: Sequence[str]) -> None:
        self._run, self._links = run, links
        self._max_steps = run.profile.max_steps
        # Of earlier sittings, where the run goes on.
        self._rows: dict[int, Any] = dict(journal_of(run.path).rows())
        validations = sorted((run.path / VALIDATION).glob("*.json"))
        self._titles: Sequence[Any] = json.loads(validations[-1].read_text(encoding="utf-8")) if validations else ()
        self._ids: dict[str, UUID] = {}
        self._sent: dict[str, ArtifactUpdate] = {}
        self._news = asyncio.Event()

    def add(self, progress: Progress) -> None:
        self._rows[progress.step] = progress.metrics
        self._titles = progress.validation_titles or self._titles
        self._news.set()

    async def send_news(self, client: PrefectClient) -> None:
        """Send what is new for ever; steps that end meanwhile go together."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self.send(client)

    async def send(self, client: PrefectClient) -> None:
        for artifact in self._artifacts():
            try:
                await self._store(client, artifact)
            except Exception as error:
                logger.warning("Prefect did not take the artifact '%s': %s", artifact.key, error)

    def _artifacts(self) -> list[Artifact]:
        name, said = self._run.name, headline(self._rows, self._max_steps)
        done = 100.0 * max(self._rows, default=0) / self._max_steps
        figures = report(self._rows, self._max_steps, self._links)
        artifacts: list[Artifact] = [
            ProgressArtifact(key="training", description=f"{said} · {name}", progress=min(done, 100.0)),
            MarkdownArtifact(key="training-figures", description=f"Figures of {name} so far", markdown=figures),
        ]
        if self._titles:
            description = f"Last validation of {name}, step {self._titles[0]['step']}"
            table = title_table(self._titles)
            artifacts.append(TableArtifact(key="validation-titles", description=description, table=table))
        return artifacts

    async def _store(self, client: PrefectClient, artifact: Artifact) -> None:
        """Create the artifact, or bring it up to date: one version for each flow run, not for each step."""
        key = str(artifact.key)
        wanted = ArtifactUpdate(data=await artifact.aformat(), description=artifact.description)
        if wanted == self._sent.get(key):
            return
        if key in self._ids:
            await client.update_artifact(self._ids[key], wanted)
        else:
            self._ids[key] = (await artifact.acreate(client)).id
        self._sent[key] = wanted
