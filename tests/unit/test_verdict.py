"""The validator's answer is read, or it is an exception."""

import pytest

from tasks.titles.errors import ServiceError, UnreadableVerdict
from tasks.titles.verdict import parse_verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("True", True),
        ("False", False),
        ("True.", True),
        (" false", False),
        ("TRUE", True),
        ("fAlSe", False),
        ("\n True \n", True),
        ("false.\n", False),
        ('"True"', True),
        ("**False**", False),
        ("`true`", True),
        ("True!", True),
    ],
)
def test_reads_a_verdict(text: str, verdict: bool) -> None:
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", ".", "Yes", "No", "1", "0", "T", "tru", "None", "vrai", "not true", "untrue", "Truely", "Falsehood"],
        *["True or False", "True False", "The title is True", "True, because the body says so"],
    ],
)
def test_refuses_anything_else(text: str) -> None:
    with pytest.raises(UnreadableVerdict) as caught:
        parse_verdict(text)
    assert repr(text) in str(caught.value)
    assert isinstance(caught.value, ServiceError)


def test_a_long_answer_is_shortened_in_the_error() -> None:
    with pytest.raises(UnreadableVerdict) as caught:
        parse_verdict("word " * 1000)
    assert len(str(caught.value)) < 400
