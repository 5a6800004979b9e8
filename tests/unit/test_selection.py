"""Top-k with the lowest index first among equals, in every shape of call (T1, T17)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.model.indexer import folded_scores, index_scores
from hadal.model.selection import RunningTopK, select_top_k, visible_entries


def by_sorting(scores, visible, k):
    """The specification: a stable descending sort of the visible scores."""
    chosen = []
    for row, count in zip(scores.tolist(), visible.tolist(), strict=True):
        order = sorted(range(count), key=lambda i: (-row[i], i))
        chosen.append(sorted(order[:k]))
    return chosen


def as_lists(selection):
    return [
        index[valid].tolist()
        for index, valid in zip(selection.index_TS, selection.valid_TS, strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_a_stable_sort(data):
    entries = data.draw(st.integers(1, 12))
    rows = data.draw(st.integers(1, 4))
    values = st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0])  # ties are the rule
    scores = torch.tensor(
        data.draw(
            st.lists(
                st.lists(values, min_size=entries, max_size=entries), min_size=rows, max_size=rows
            )
        )
    )
    visible = torch.tensor(
        data.draw(st.lists(st.integers(0, entries), min_size=rows, max_size=rows))
    )
    k = data.draw(st.integers(1, 14))
    selection = select_top_k(scores, visible, k)
    assert as_lists(selection) == by_sorting(scores, visible, k)


def test_prefill_and_decode_break_ties_alike():
    """T1: all scores zero; more entries appear later; the choice of the first ones must not move."""
    for total in (8, 9, 64, 513):
        selection = select_top_k(torch.zeros(1, total), torch.tensor([total]), 5)
        assert as_lists(selection) == [[0, 1, 2, 3, 4]]


def test_what_lies_beyond_the_visible_entries_cannot_be_chosen():
    """T17: uninitialised scores and NaN there are no candidates."""
    scores = torch.tensor([[1.0, 2.0, float("nan"), float("inf")]])
    assert as_lists(select_top_k(scores, torch.tensor([2]), 4)) == [[0, 1]]
    assert as_lists(select_top_k(scores, torch.tensor([0]), 4)) == [[]]


def test_a_block_is_visible_at_the_token_that_completes_it():
    positions = torch.arange(10)
    assert visible_entries(positions, 4).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (5, 17), (64, 1024)])
def test_folded_scores_are_the_formula(queries, keys):
    """The fast form, against the reference; and no row's bits depend on the others."""
    query, weight = torch.randn(queries, 9, 24), torch.randn(queries, 9)
    weight[0, 0] = 0.0
    key = torch.randn(keys, 24)
    fast = folded_scores(query, weight, key)
    assert torch.allclose(fast, index_scores(query, weight, key, in_bfloat16=False), atol=2e-5)
    for row in range(0, queries, 7):
        alone = folded_scores(query[row : row + 1], weight[row : row + 1], key)
        assert torch.equal(alone, fast[row : row + 1])
    for count in range(1, keys, 5):
        assert torch.equal(folded_scores(query, weight, key[:count]), fast[:, :count])


@pytest.mark.parametrize("block", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("levels", [2, 7, 1000])
def test_block_by_block_equals_a_stable_sort(block, levels):
    """Few levels: nearly all scores are equal to others, zeros of both signs among them."""
    scores = torch.randint(-levels, levels, (9, 300)).float() / levels
    scores[:, ::5] *= -0.0
    visible = torch.tensor([0, 1, 5, 16, 17, 100, 200, 299, 300])
    best = RunningTopK(visible, 16)
    for first in range(0, 300, block):
        best.add(scores[:, first : first + block], first)
    chosen = best.selection()
    rows = zip(chosen.index_TS.tolist(), chosen.valid_TS.tolist(), strict=True)
    got = [[i for i, valid in zip(*row, strict=True) if valid] for row in rows]
    assert got == by_sorting(scores, visible, 16)
