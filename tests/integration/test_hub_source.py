"""Stories from the hub: the real client against a hub on this machine, reached through HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NAME = "newsroom/stories"
REVISION = "1" * 40


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def row(number: int) -> dict[str, Any]:
    return {
        "id": number,
        "by": "ann",
        "time": datetime(2024, 5, 1, 12, 30),
        "title": f"Title {number}",
        "url": None,
        "score": 30,
        "scraped_body": f"Body {number}",
        "scraping_error": "an extra column",
    }


FILES = {
    "data/train-00000-of-00001.parquet": parquet([row(number) for number in range(5)]),
    "data/val-00000-of-00001.parquet": parquet([row(number) for number in range(5, 7)]),
}


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub that the client asks to read one public data set."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/{REVISION}/"
        if path.startswith((f"{api}/tree/", f"{api}/paths-info/")):
            self.answer(json.dumps([{"type": "file", "path": p, "size": len(c), "oid": p} for p, c in FILES.items()]))
        elif path.startswith(api):
            self.answer(json.dumps({"id": NAME, "sha": REVISION, "siblings": [{"rfilename": path} for path in FILES]}))
        elif path.startswith(files) and path.removeprefix(files) in FILES:
            content = FILES[path.removeprefix(files)]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": REVISION})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if NAME in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_POST = do_GET

    def answer(self, content: str | bytes, **headers: str) -> None:
        body = content.encode() if isinstance(content, str) else content
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def load(source: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load `source` in a fresh process, for the client reads its environment once, at import."""
    code = (
        "import sys\n"
        "from tasks.titles.errors import DataError\n"
        "from tasks.titles.sources import load_stories\n"
        "try: loaded = load_stories(sys.argv[1])\n"
        "except DataError as error: sys.exit(f'DataError: {error}')\n"
        "for story in loaded.stories: print(story.id, story.split, story.time.isoformat(), story.scraped_body)\n"
        "print(loaded.division.note)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    return subprocess.run(
        [sys.executable, "-c", code, source],
        # The test's hub has no large-file store of the hub's own kind.
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_data_set_by_name(hub: str, tmp_path: Path) -> None:
    done = load(NAME, tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *(f"{number} train 2024-05-01T12:30:00+00:00 Body {number}" for number in range(5)),
        *(f"{number} val 2024-05-01T12:30:00+00:00 Body {number}" for number in range(5, 7)),
        "The source has no test split: half of val became test.",
    ]


def test_a_data_set_that_is_not_there(hub: str, tmp_path: Path) -> None:
    done = load("newsroom/storys", tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 1
    assert f"DataError: The data set 'newsroom/storys' could not be loaded from {hub}" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network(tmp_path: Path) -> None:
    done = load(NAME, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "DataError: The data set 'newsroom/stories' could not be loaded from https://huggingface.co" in done.stderr
    assert "give the path of a .parquet or .jsonl file, or 'starter'" in done.stderr
    assert "Traceback" not in done.stderr
