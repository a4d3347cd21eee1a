"""An HTML page reduced to what a reader reads: paragraphs without scripts, menus and footers."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

FEWEST_CHARACTERS = 200
"""Below this, what is marked as the article (or what is left without menus) is not taken for the page's text."""

_UNSEEN = frozenset({"script", "style", "noscript", "template", "svg", "head", "iframe", "object", "select"})
_AROUND = frozenset({"nav", "header", "footer", "aside", "form", "button", "dialog"})
_ARTICLE = frozenset({"article", "main"})
_BREAKS = frozenset(
    {
        "address", "article", "blockquote", "br", "caption", "dd", "div", "dl", "dt", "fieldset", "figcaption",
        "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section", "table",
        "td", "th", "tr", "ul", "body",
    }
)  # fmt: skip
_TRACKED = _UNSEEN | _AROUND | _ARTICLE | {"title", "pre"}


class _Reader(HTMLParser):
    """Collects text with the marked elements that it stands in."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[tuple[str, frozenset[str]]] = []
        self._open: Counter[str] = Counter()
        self._within: frozenset[str] = frozenset()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            # A head that nobody closed ends here.
            self._count("head", -self._open["head"])
        if tag in _TRACKED:
            self._count(tag, 1)
        if tag in _BREAKS:
            self.pieces.append(("\n\n", self._within))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BREAKS:
            self.pieces.append(("\n\n", self._within))

    def handle_endtag(self, tag: str) -> None:
        if tag in _TRACKED and self._open[tag]:
            self._count(tag, -1)
        if tag in _BREAKS:
            self.pieces.append(("\n\n", self._within))

    def handle_data(self, data: str) -> None:
        # Line breaks mean something in preformatted text alone.
        self.pieces.append((data if "pre" in self._within else " ".join(f"|{data}|".split())[1:-1], self._within))

    def _count(self, tag: str, change: int) -> None:
        self._open[tag] += change
        self._within = frozenset(name for name, depth in self._open.items() if depth > 0)


def page_text(html: str) -> str:
    """Return the text of a page, paragraphs parted by blank lines; "" where it has none.

    It is that of the `article` or `main` element where there is one with some length, or else of all but menus, heads
    and footers, or else of everything that is shown.
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    shown = [(text, within) for text, within in reader.pieces if not within & _UNSEEN and "title" not in within]
    content = [(text, within) for text, within in shown if not within & _AROUND]
    article = _joined([text for text, within in content if within & _ARTICLE])
    without = _joined([text for text, _ in content])
    for found in (article, without):
        if len(found) >= FEWEST_CHARACTERS:
            return found
    return _joined([text for text, _ in shown])


def _joined(pieces: list[str]) -> str:
    paragraphs = "".join(pieces).split("\n\n")
    return "\n\n".join(paragraph.strip() for paragraph in paragraphs if paragraph.strip())
