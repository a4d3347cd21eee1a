"""Which prompts are computed on top of one prefix."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tasks.engines.cpu.sampler import Cluster, share_prefixes
from tasks.titles.prefixes import SHARED_SHARE

PROMPTS = st.dictionaries(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), st.integers(1, 6), min_size=1, max_size=12
)


def cost(clusters: list[Cluster], prompts: dict[tuple[int, ...], int]) -> int:
    """Return the tokens that are computed before the first is sampled."""
    total = 0
    for cluster in clusters:
        if len(cluster.prompts) == 1:
            total += len(cluster.prompts[0])
        else:
            total += cluster.shared + sum(prompts[p] * (len(p) - cluster.shared) for p in cluster.prompts)
    return total


@given(PROMPTS)
def test_every_prompt_is_in_one_cluster_and_begins_with_its_prefix(prompts: dict[tuple[int, ...], int]) -> None:
    clusters = share_prefixes(prompts)
    assert sorted(p for cluster in clusters for p in cluster.prompts) == sorted(prompts)
    for cluster in clusters:
        prefix = cluster.prompts[0][: cluster.shared]
        assert all(prompt[: cluster.shared] == prefix for prompt in cluster.prompts)
        if len(cluster.prompts) == 1:
            assert cluster.shared == len(cluster.prompts[0])
        else:
            assert all(SHARED_SHARE * len(prompt) <= cluster.shared < len(prompt) for prompt in cluster.prompts)


@given(PROMPTS)
def test_sharing_never_costs_more_than_not_sharing(prompts: dict[tuple[int, ...], int]) -> None:
    assert cost(share_prefixes(prompts), prompts) <= sum(len(prompt) for prompt in prompts)


def test_titles_of_one_article_share_it_and_articles_stay_apart() -> None:
    random_ids = random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(random_ids.randrange(1000) for _ in range(count))

    system = ids(90)
    articles = [system + ids(240) for _ in range(8)]
    prompts = {article + ids(30): 1 for article in articles for _ in range(6)}
    clusters = share_prefixes(prompts)
    assert sorted(len(cluster.prompts) for cluster in clusters) == [6] * 8
    assert all(330 <= cluster.shared < 335 for cluster in clusters)


def test_generations_of_one_prompt_are_not_read_again_to_share_with_another() -> None:
    prompts = {(1,) * 20 + (2,) * 5: 6, (1,) * 20 + (3,) * 5: 6}
    assert [cluster.shared for cluster in share_prefixes(prompts)] == [25, 25]
