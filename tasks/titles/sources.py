"""Where stories come from: the starter world, a local file or a data set on the hub."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.titles.config import export_hub_endpoint
from tasks.titles.errors import DataError
from tasks.titles.rows import LoadedStories, Row, read_rows
from tasks.titles.story import COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

FILE_TYPES = (".parquet", ".jsonl")
REQUIRED = tuple(column for column in COLUMNS if column != "split")
_ALIKE = 0.5  # 'body' is like 'scraped_body', and 'stories.parquet' like 'stories.jsonl'
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_stories(source: str) -> LoadedStories:
    """Read every story of `source`: 'starter', a .parquet or .jsonl file, or the name of a hub data set.

    A file needs the columns of `COLUMNS` except `split`, which a hash of the id stands in for.
    Rows that cannot be a story are counted in the result.

    Raises `DataError` for a source that does not exist, cannot be read, lacks a column or has no rows.
    """
    if source == "starter":
        from tasks.starter.world import generate_stories

        return LoadedStories(source, tuple(generate_stories()))
    path = Path(source).expanduser()
    if path.suffix.lower() in FILE_TYPES:
        rows = _file_rows(path)
    elif path.is_dir():
        raise _is_folder(path)
    elif path.exists():
        raise DataError(f"{path} is neither of {' and '.join(FILE_TYPES)}. Convert it to one of them.")
    elif _HUB_NAME.fullmatch(source) and not path.parent.is_dir():
        rows = _hub_rows(source)
    else:
        raise _not_found(path)
    if not rows:
        raise DataError(f"{source} has no rows. Expected stories with the columns {', '.join(REQUIRED)}.")
    return read_rows(source, rows)


def _file_rows(path: Path) -> Sequence[Row | None]:
    if path.is_dir():
        raise _is_folder(path)
    if not path.is_file():
        raise _not_found(path)
    try:
        return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(names, str(path))
            wanted = [name for name in COLUMNS if name in names]
            return [row for batch in file.iter_batches(columns=wanted) for row in _plain(pa.table(batch))]
    except pa.ArrowException as error:
        raise DataError(f"{path} is no readable parquet file: {error}. Write or copy it again.") from error


def _jsonl_rows(path: Path) -> list[Row | None]:
    rows: list[Row | None] = []
    first_error = ""
    with path.open("rb") as file:  # bytes: one line that is no UTF-8 must not take the others along
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                rows.append(row)
            except (ValueError, RecursionError) as error:
                first_error = first_error or f"line {number}: {error}"
                rows.append(None)
    if rows and all(row is None for row in rows):
        raise DataError(f"{path} holds no JSON object in any line ({first_error}). Expected one story per line.")
    if rows:
        _require_columns({key for row in rows if row is not None for key in row}, str(path))
    return rows


def _hub_rows(name: str) -> list[Row]:
    """Read a hub data set; its own splits stand in for a `split` column where it has none."""
    export_hub_endpoint()
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the client has no common base: connection, HTTP, data set and value errors
        raise DataError(
            f"The data set '{name}' could not be loaded from {datasets.config.HF_ENDPOINT} "
            f"({type(error).__name__}: {error}). Check its name, the network and HF_ENDPOINT (HF_TOKEN for a private "
            "one). Without a network, give the path of a .parquet or .jsonl file, or 'starter'."
        ) from error
    rows: list[Row] = []
    for split, dataset in splits.items():
        _require_columns(dataset.column_names, f"{name} ({split})")
        wanted = [column for column in COLUMNS if column in dataset.column_names]
        for table in dataset.select_columns(wanted).with_format("arrow").iter(batch_size=1000):
            rows += ({"split": str(split), **row} for row in _plain(table))
    return rows


def _plain(table: pa.Table) -> list[dict[str, Any]]:
    """Turn a table into rows of plain values, without an exception for any single odd value.

    Times become epoch seconds (Arrow's may lie beyond Python's range), and texts bytes (Arrow's need
    not be valid UTF-8); `tasks.titles.rows` reads both.
    """
    import pyarrow as pa

    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("s"), safe=False)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        columns[name] = column.to_pylist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _require_columns(names: Iterable[str], source: str) -> None:
    names = sorted(set(names))
    missing = [column for column in REQUIRED if column not in names]
    if not missing:
        return
    hints = []
    for column in missing:
        close = difflib.get_close_matches(column, names, n=1, cutoff=_ALIKE)
        hints.append(f"'{column}'" + (f" (is it '{close[0]}'?)" if close else ""))
    raise DataError(
        f"{source} lacks the column {', '.join(hints)}. Expected {', '.join(REQUIRED)} and, if you like, split; "
        f"it has {', '.join(names) or 'none'}. Rename or add the column."
    )


def _is_folder(path: Path) -> DataError:
    return DataError(f"{path} is a folder. Expected 'starter', a {' or '.join(FILE_TYPES)} file or a hub data set.")


def _not_found(path: Path) -> DataError:
    """Say that `path` is not there, and what lies where it first goes wrong and is spelled like it."""
    folder, wanted = path.parent, path.name
    while not folder.is_dir():
        folder, wanted = folder.parent, folder.name
    close = difflib.get_close_matches(wanted, [entry.name for entry in folder.iterdir()], n=3, cutoff=_ALIKE)
    hint = f" Did you mean {' or '.join(str(folder / name) for name in close)}?" if close else ""
    return DataError(
        f"There are no stories at '{path}'.{hint} Expected 'starter', a {' or '.join(FILE_TYPES)} file, "
        "or a hub data set's name such as 'OpenPipe/hacker-news-scraped-stories-filtered'."
    )
