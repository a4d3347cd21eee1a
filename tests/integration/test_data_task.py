"""The Prefect task of the data stage, in Prefect's own harness."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from prefect import flow
from prefect.settings import get_current_settings

from tasks.data import prepare_prompts_task
from tasks.titles.config import load_profile
from tasks.titles.errors import DataError
from tasks.titles.prepare import PreparedPrompts

pytestmark = pytest.mark.usefixtures("prefect_harness")


@flow
def data_flow(stories: str, cache_dir: Path) -> PreparedPrompts:
    return prepare_prompts_task(load_profile("starter", [f"stories={stories}"]), cache_dir)


def test_the_report_becomes_an_artifact(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    names = ("id", "by", "time", "title", "url", "score", "scraped_body", "split")
    rows = [
        (number, "ann", 1_700_000_000, f"Title {number}", "", 30, f"Body {number}", split)
        for number, split in enumerate(("train", "train", "val", "test"))
    ]
    path.write_text("".join(f"{json.dumps(dict(zip(names, row, strict=True)))}\n" for row in rows), encoding="utf-8")
    prepared = data_flow(str(path), tmp_path / "cache")
    assert (len(prepared.train), len(prepared.val), len(prepared.test)) == (2, 1, 1)
    # Over HTTP, as the UI asks: Prefect's client sends nulls, which its server refuses with FastAPI from 0.151 on.
    address = f"{get_current_settings().api.url}/artifacts/latest/filter"
    (artifact,) = httpx.post(address, json={"artifacts": {"key": {"any_": ["stories"]}}}).raise_for_status().json()
    assert artifact["type"] == "markdown"
    assert artifact["data"] == prepared.report.as_markdown()
    assert "| rows in the source | 2 | 1 | 1 | 4 |" in artifact["data"]


def test_an_error_reaches_the_flow_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no stories at"):
        data_flow(str(tmp_path / "missing.parquet"), tmp_path)
