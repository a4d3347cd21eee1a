"""The data cursor: which stories come next, a pure function of a seed and a place.

The order of an epoch depends on the run's seed and the epoch's number alone, so a resumed run sees
the stories that an uninterrupted one would have seen. A cursor is bound to its stories by their
fingerprint: on other stories the same index would mean another story.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from tasks.titles.errors import CheckpointError, DataError

Item = TypeVar("Item")

VALIDATION_STEP = 0
"""The step in the seeds of validation titles: every checkpoint of a run draws with the same ones."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the endless, per-epoch shuffled sequence of stories.

    `index` counts the stories of `epoch` that were drawn; `step` counts policy updates. The two move
    apart where a batch had nothing to train on.
    """

    seed: int
    fingerprint: str
    epoch: int = 0
    index: int = 0
    step: int = 0

    def next_batch(self, stories: Sequence[Item], groups_per_step: int) -> tuple[list[Item], Cursor]:
        """Return the next stories and the cursor after them.

        A batch always has `groups_per_step` stories (all of them where there are fewer) and never reaches into
        the next epoch: what an epoch has left over at its end is not used in it, and comes at another place of
        the next one's order. Each story thus comes at most once per epoch, and none twice within a step.

        Raises `DataError` where there are no stories.
        """
        if not stories:
            raise DataError("There are no training stories to draw a batch from.")
        size = min(groups_per_step, len(stories))
        order = epoch_order(self.seed, self.epoch, len(stories))
        end = self.index + size
        batch = [stories[place] for place in order[self.index : end]]
        if end + size > len(stories):
            return batch, replace(self, epoch=self.epoch + 1, index=0)
        return batch, replace(self, index=end)

    def stepped(self) -> Cursor:
        """Return the cursor after one policy update."""
        return replace(self, step=self.step + 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them back."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Cursor:
        """Read `to_json`'s values, whatever else lies beside them.

        Raises `CheckpointError` naming a key that is missing or of another type.
        """
        chosen: dict[str, Any] = {}
        for field in fields(Cursor):
            wanted = str if field.name == "fingerprint" else int
            value = values.get(field.name)
            if type(value) is not wanted:
                raise CheckpointError(
                    f"A data cursor needs '{field.name}' as {wanted.__name__}, got {value!r}. "
                    "The checkpoint was not written by this project, or was edited: start the run under another name."
                )
            chosen[field.name] = value
        return Cursor(**chosen)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """Return a permutation of `range(count)`, the same for the same seed and epoch on every machine."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def stories_fingerprint(ids: Iterable[str]) -> str:
    """Return a short hash of the stories' ids in their order."""
    digest = hashlib.sha256()
    for identifier in ids:
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        encoded = identifier.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:16]


def sampling_seed(run_seed: int, epoch: int, step: int, story_id: str, generation: int) -> int:
    """Return the seed that one title is sampled with, in 0 … 2³¹-1 (the range that every server takes).

    A group's seeds follow one another: that is how vLLM seeds the choices of one request, so that a title is the
    same whether it is asked for alone or with its group.

    The epoch takes part because a batch without spread does not advance the step: a story met again
    at the same step must not be given the same titles again.
    """
    key = f"{run_seed}/{epoch}/{step}/{story_id}".encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 2) + generation
