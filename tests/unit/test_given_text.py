"""Texts from files, standard input and the web, among them those that somebody else has laid out as traps."""

from __future__ import annotations

import gzip
import io
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks.titles import fetch
from tasks.titles.errors import ConfigError, DataError, HnTitlesError, ServiceRejected, ServiceUnavailable
from tasks.titles.fetch import fetch_page
from tasks.titles.given_text import read_text
from tasks.titles.html_text import page_text

LONG = "Norwind ships a database that keeps its promises on slow disks. " * 5
PAGE = f"""<!doctype html><html><head><title>Shop &amp; more</title><style>p {{ color: red }}</style>
<script>var x = "<p>never shown</p>";</script></head><body><nav><ul><li>Home<li>About</ul></nav>
<article><header>By somebody</header><h1>Fast &lt;disks&gt;</h1><p>{LONG}</p><pre>a  =  1
b  =  2</pre></article><footer>All rights</footer></body></html>"""


class Pages(BaseHTTPRequestHandler):
    """A web site with one page of each kind."""

    def do_GET(self) -> None:
        kinds: dict[str, tuple[int, dict[str, str], bytes]] = {
            "/page": (200, {"Content-Type": "text/html; charset=utf-8"}, PAGE.encode()),
            "/latin": (200, {"Content-Type": "text/html"}, b"<meta charset=iso-8859-1><p>caf\xe9"),
            "/odd": (200, {"Content-Type": "text/plain; charset=nonsense"}, "Zürich".encode()),
            "/moved": (302, {"Location": "/page"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/away": (302, {"Location": "ftp://example.org/file"}, b""),
            "/nowhere": (302, {"Location": "http://host:port/"}, b""),
            "/large": (200, {"Content-Type": "text/plain"}, b"x" * 5000),
            "/bomb": (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, gzip.compress(b"x" * 100_000)),
            "/broken": (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, b"no gzip"),
            "/picture": (200, {"Content-Type": "image/png"}, b"\x89PNG"),
            "/blank": (200, {"Content-Type": "text/html"}, b"<script>1</script>"),
        }
        status, headers, body = kinds.get(self.path, (404, {}, b"not here"))
        if self.path == "/host":
            body = self.headers["Host"].encode()
            status, headers = 200, {"Content-Type": "text/plain"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_page_is_its_article() -> None:
    text = page_text(PAGE)
    assert text.startswith("Fast <disks>\n\nNorwind ships") and text.endswith("a  =  1\nb  =  2")
    assert not any(word in text for word in ("Home", "rights", "never", "color", "Shop", "By somebody"))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One</p><p>two", "One\n\ntwo"),
        ("plain words", "plain words"),
        ("<p>in a <b>row</b> of\n words</p>", "in a row of words"),
        ("<nav>only menus</nav>", "only menus"),
        (f"<nav>never closed<p>{LONG}", f"never closed\n\n{LONG.strip()}"),
        (f"<article>short</article><p>{LONG}", f"short\n\n{LONG.strip()}"),
        ("<head><title>t</title><body><p>no end of head", "no end of head"),
        ("<p>a &amp; b &#233;", "a & b é"),
        ("<!-- <p>no --><p>yes", "yes"),
        ("<script>if (a < b) {}</script>", ""),
        ("", ""),
    ],
)
def test_text_of_pages(html: str, text: str) -> None:
    assert page_text(html) == text


@pytest.mark.parametrize(
    ("path", "text"),
    [("/moved", "Fast <disks>"), ("/latin", "café"), ("/odd", "Zürich"), ("/host", "127.0.0.1:")],
)
async def test_a_page_is_fetched(site: str, path: str, text: str) -> None:
    given = await read_text(f"{site}{path}", allow_private=True)
    assert text in given.text
    assert given.url == (f"{site}/page" if path == "/moved" else f"{site}{path}")


@pytest.mark.parametrize(
    ("path", "kind", "told"),
    [
        ("/gone", ServiceRejected, "status 404"),
        ("/loop", ServiceRejected, "redirects more than"),
        ("/away", ConfigError, "expected http"),
        ("/nowhere", ServiceUnavailable, "Invalid URL in location"),
        ("/large", DataError, "more than 2,000 bytes"),
        ("/bomb", DataError, "more than 2,000 bytes"),
        ("/broken", DataError, "unpacked"),
        ("/picture", DataError, "image/png"),
        ("/blank", DataError, "holds no text"),
    ],
)
async def test_what_cannot_be_used_is_told(
    site: str, path: str, kind: type[HnTitlesError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "LARGEST_PAGE", 2000)
    with pytest.raises(kind, match=told):
        await read_text(f"{site}{path}", allow_private=True)


async def test_a_private_address_is_asked_only_when_told(site: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 is no public address.*--allow-private"):
        await read_text(f"{site}/page")


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "[64:ff9b::a00:1]",
        "[2002:7f00:1::]",
    ],
)  # fmt: skip
async def test_no_spelling_of_a_private_address_gets_through(host: str) -> None:
    with pytest.raises(ConfigError, match="no public address"):
        await fetch_page(f"http://{host}/")


@pytest.mark.parametrize(
    "url", ["http://", "http://user:word@example.org/", "file:///etc/passwd", "ftp://x/y", "http://host:port/"]
)
async def test_what_is_no_address_of_a_page(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|no address"):
        await read_text(url)


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(fetch, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1"):
            await fetch_page(url, allow_private=True)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"A body.\n", "A body."),
        ("a.html", b"<p>A <i>body</i>.", "A body."),
        ("a.md", b"<p>kept as it is", "<p>kept as it is"),
        ("bad.txt", b"half \xff", "half \ufffd"),
        ("escape.txt", b"red \x1b[31malarm\x07\n\tend", "red [31malarm\n\tend"),
    ],
)
async def test_files_and_standard_input(
    name: str, content: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    assert (await read_text(str(tmp_path / name))).text == text
    if not name.endswith(".html"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        given = await read_text("-")
        assert (given.text, given.source) == (text, "standard input")


@pytest.mark.parametrize(
    ("content", "told"), [(None, "No such file"), (b" \n", "holds no text"), (b"\0\1", "zero bytes")]
)
async def test_files_that_are_no_text(content: bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        await read_text(str(path))


async def test_a_story_is_known_by_its_text() -> None:
    given = await read_text(__file__)
    assert given.story("x").id == given.story("y").id and given.story("x").scraped_body == "x"
