"""Reads what the validator answered."""

from __future__ import annotations

import re

from tasks.titles.errors import UnreadableVerdict

_VERDICT = re.compile(r"""[\s"'`*]*(true|false)[\s"'`*.!]*""", re.IGNORECASE)


def parse_verdict(text: str) -> bool:
    """Return whether the validator's answer says that the body supports the title.

    The one word may stand in any case, with blanks, quotes, emphasis or a full stop around it.
    Anything else, an empty answer included, raises `UnreadableVerdict`: a guess in either direction
    would reward or punish the policy for its judge's mistake.
    """
    match = _VERDICT.fullmatch(text)
    if match is None:
        raise UnreadableVerdict(
            f"The validator must answer True or False, but answered {_shortened(text)!r}. The trajectory is dropped; "
            "if this is common, the base model is too weak a validator or its chat template is wrong."
        )
    return match.group(1).lower() == "true"


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
