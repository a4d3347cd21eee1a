"""The opening of a body: its first sentence, whole or cut to a title's length."""

from __future__ import annotations

import re
from itertools import zip_longest

TITLE_LENGTH = 80
"""Characters of the longest title that Hacker News takes."""

# Marks of Markdown that carry no words: code fences, rules, links' targets, images, emphasis, quotes, bullets.
_FENCE = re.compile(r"^\s*(?:```|~~~)")
_NO_TEXT_LINE = re.compile(r"^\s*(?:(?:```|~~~).*|[-*_=|:\s]+|https?://\S+)$")
_HEADING = re.compile(r"^\s{0,3}#{1,6}\s")
_UNDERLINE = re.compile(r"^\s*(?:={3,}|-{3,})\s*$")
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`+)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_LEAD = re.compile(r"^\s*(?:>\s*|[-*+•]\s+|\d{1,2}[.)]\s+)+")

# A full stop, with what closes behind it, is an end where white space and no small letter follow. Chinese and Japanese
# full stops need no white space.
_OPENS, _CLOSES = r"""["'(\[\u2018\u201c\u00ab]""", r"""["')\]\u2019\u201d\u00bb]"""
_END = re.compile(rf"[.!?\u2026]+{_CLOSES}*(?=\s+{_OPENS}*[^\sa-z])|[\u3002\uff01\uff1f]+[\u300d\u300f\uff09]*")
_ABBREVIATION = re.compile(
    r"(?i)mrs?|ms|dr|prof|st|mt|vs|etc|inc|ltd|co|corp|vol|al|jr|sr|approx|dept|gov|jan|feb|aug|sept|oct|nov"
)
_SHORT = re.compile(r"(?:\w\.)*\w")  # an initial (J.) or letters with full stops between them (U.S., e.g.)


def opening_sentence(body: str) -> str:
    """Return the first sentence of the first paragraph that is neither heading, link, image nor code fence.

    Markdown's marks are taken off. A paragraph without any full stop counts as one sentence; a body of
    headings alone gives the first of them, one of nothing but code all of it, and a blank one "".
    """
    paragraph = _first_paragraph(body)
    for end in _END.finditer(paragraph):
        last_word = re.split(rf"(?:\s|{_OPENS})+", paragraph[: end.start()])[-1]
        is_stop = not end[0].startswith(".") or end[0].startswith("..")
        if is_stop or not (_ABBREVIATION.fullmatch(last_word) or _SHORT.fullmatch(last_word)):
            return paragraph[: end.end()]
    return paragraph


def first_sentence(body: str, limit: int = TITLE_LENGTH) -> str:
    """Return the body's first sentence as a title: without its full stop, and at most `limit` characters long."""
    sentence = opening_sentence(body)
    if sentence.endswith(".") and not sentence.endswith(".."):
        sentence = sentence[:-1]
    return cut(sentence, limit)


def cut(text: str, limit: int) -> str:
    """Return `text` with at most `limit` characters, ending with a whole word wherever there is one."""
    if len(text) <= limit:
        return text
    whole_words = re.match(r".*\S(?=\s)", text[: limit + 1], re.DOTALL)
    return (whole_words[0] if whole_words else text[:limit]).rstrip(" ,;:\u2013\u2014-")


def _first_paragraph(body: str) -> str:
    heading = ""
    paragraph: list[str] = []
    in_code = False
    lines = body.splitlines()
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        if _FENCE.match(line):
            in_code = not in_code
        text = "" if in_code or _NO_TEXT_LINE.match(line) else _plain(line)
        is_heading = _HEADING.match(line) or (not paragraph and _UNDERLINE.match(following))
        if text and is_heading:
            heading = heading or text
        if paragraph and (not text or is_heading or _LEAD.match(line)):
            break
        if text and not is_heading:
            paragraph.append(text)
    return " ".join(paragraph) or heading or " ".join(body.split())


def _plain(line: str) -> str:
    """Return a line's words without Markdown's marks, with single spaces between them."""
    text = _LINK.sub(r"\1", _IMAGE.sub("", _HEADING.sub("", line)))
    text = _EMPHASIS.sub(r"\2", _LEAD.sub("", text))
    return " ".join(text.split())
