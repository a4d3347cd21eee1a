"""The text that somebody wants a title for: from a file, an address or standard input."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from tasks.titles.errors import ConfigError, DataError
from tasks.titles.fetch import LARGEST_PAGE, decoded, fetch_page
from tasks.titles.html_text import page_text
from tasks.titles.story import Story

STDIN = "-"
_HTML_FILES = frozenset({".html", ".htm", ".xhtml"})


@dataclass(frozen=True, slots=True)
class GivenText:
    """A text and where it is from."""

    source: str
    text: str
    url: str = ""

    def story(self, body: str) -> Story:
        """Return `body`, which is this text or its beginning, as a story that has neither title nor votes."""
        digest = hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return Story(id=digest, by="", time=None, title="", url=self.url, score=0, scraped_body=body, split="test")


async def read_text(source: str, *, allow_private: bool = False) -> GivenText:
    """Read a file's path, an http or https address, or `-` for standard input; HTML becomes plain text.

    Raises `DataError` for what cannot be read, is no text or is blank, and what `fetch_page` raises.
    """
    url = ""
    if source == STDIN:
        source, text = "standard input", _plain(_bounded(sys.stdin.buffer.read(LARGEST_PAGE + 1), "standard input"))
    elif source.lower().startswith(("http://", "https://")):
        page = await fetch_page(source, allow_private=allow_private)
        url, text = page.url, page_text(page.text) if page.html else page.text
    elif "://" in source:
        raise ConfigError(f"'{source}' cannot be fetched: expected http:// or https://, a file's path, or - for stdin.")
    else:
        text = _file(Path(source))
    text = printable(text).strip()
    if not text:
        raise DataError(f"{source} holds no text to write titles for.")
    return GivenText(source, text, url)


def printable(text: str) -> str:
    """Return `text` without control characters, so that nothing in it steers a terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = _bounded(file.read(LARGEST_PAGE + 1), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Expected a file, an http address or -.") from error
    return page_text(decoded(content)) if path.suffix.lower() in _HTML_FILES else _plain(content)


def _bounded(content: bytes, source: str) -> bytes:
    if len(content) > LARGEST_PAGE:
        raise DataError(f"{source} holds more than {LARGEST_PAGE:,} bytes. Give the part that matters.")
    return content


def _plain(content: bytes) -> str:
    if b"\0" in content:
        raise DataError("This is no text: it holds zero bytes. Give plain text or HTML.")
    return content.decode("utf-8", "replace")
