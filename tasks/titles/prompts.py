"""What the policy, the validator and the reward model read, word for word.

Bodies and titles are untrusted text. `neutralise` breaks the few character sequences that would let
one of them leave its place: the chat template's control tokens and the tags that frame each part.
Everything else reaches the models unchanged.
"""

from __future__ import annotations

import re
from datetime import datetime

POLICY_SYSTEM = (
    "You are a helpful assistant that generates engaging titles for Hacker News posts. "
    "Respond with just the title, no other text."
)
POLICY_USER = (
    "Generate a concise, engaging title for this Hacker News submission. "
    "The title should be informative yet catchy.\n\nContent: {body}"
)
VALIDATOR_SYSTEM = (
    "You are a moderator for Hacker News. You are given the body of an article, as well as a "
    "proposed title. You are to determine whether the title makes any claims that are not "
    "substantiated by the article body. If there are any unsubstantiated claims, you should return "
    "False. Otherwise, you should return True. Only return False or True, no other text."
)
VALIDATOR_USER = "<article>{body}</article>\n<proposed_title>{title}</proposed_title>"

_FRAMING_TAG = re.compile(r"<(?=\s*/?\s*(?:article|proposed_title|submitter|url|date|body|title)\s*>)", re.IGNORECASE)
# A whole token such as <|im_end|>; the operators <| and <|> of programming languages are ordinary text.
_CONTROL_TOKEN = re.compile(r"<(?=\|[^\s<>|]+\|>)")


def neutralise(text: str) -> str:
    """Return `text` with framing tags and control tokens made harmless.

    The opening bracket of `<article>`, `</title>`, `<|im_end|>` and the like becomes `&lt;`.
    """
    return _CONTROL_TOKEN.sub("&lt;", _FRAMING_TAG.sub("&lt;", text))


def policy_messages(body: str) -> tuple[dict[str, str], ...]:
    """Return the chat that asks the policy for a title of `body`."""
    return (
        {"role": "system", "content": POLICY_SYSTEM},
        {"role": "user", "content": POLICY_USER.format(body=neutralise(body))},
    )


def validator_messages(body: str, title: str) -> tuple[dict[str, str], ...]:
    """Return the chat that asks the validator whether `body` supports `title`."""
    user = VALIDATOR_USER.format(body=neutralise(body), title=neutralise(title))
    return (
        {"role": "system", "content": VALIDATOR_SYSTEM},
        {"role": "user", "content": user},
    )


def reward_model_text(*, title: str, by: str, time: datetime | None, scraped_body: str, url: str) -> str:
    """Return what the reward model reads; the title comes last, so titles of one body share a prefix."""
    date = time.strftime("%Y-%m-%d") if time is not None else ""
    return (
        f"<submitter>{neutralise(by)}</submitter>\n"
        f"<url>{neutralise(url)}</url>\n"
        f"<date>{date}</date>\n"
        "\n"
        f"<body>{neutralise(scraped_body)}</body>\n"
        f"<title>{neutralise(title)}</title>"
    )
