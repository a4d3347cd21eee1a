"""Prompts in a file: written whole or not at all, and read back the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tasks.titles.errors import DataError
from tasks.titles.prompts import policy_messages
from tasks.titles.story import Prompt, Story

_ABOUT_KEY = b"hn-titles"


def write_prompts(path: Path, prompts: Iterable[Prompt], about: str) -> None:
    """Write `prompts`, in their order, and a text `about` them as one Parquet file.

    The chats are left out: `read_prompts` makes them of the stories again. Raises `DataError` where the folder
    cannot be written to.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [{**_columns(prompt.story), "tokens": prompt.tokens} for prompt in prompts]
    table = pa.Table.from_pylist(columns).replace_schema_metadata({_ABOUT_KEY: about})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        os.close(handle)
        try:
            pq.write_table(table, name, write_page_checksum=True)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"The prompts cannot be kept in {path.parent}: {error}. Make the folder writable.") from error


def read_prompts(path: Path) -> tuple[tuple[Prompt, ...], str]:
    """Return the prompts of a file and the text about them; raise `DataError` where it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            about = file.schema_arrow.metadata[_ABOUT_KEY].decode()
            rows = file.read().to_pylist()
        prompts = []
        for row in rows:
            tokens = row.pop("tokens")
            prompts.append(Prompt(Story(**row), policy_messages(row["scraped_body"]), tokens))
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a file of prompts: {type(error).__name__}: {error}") from error
    return tuple(prompts), about


def _columns(story: Story) -> dict[str, object]:
    return {name: getattr(story, name) for name in Story.__slots__}
