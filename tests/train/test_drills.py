"""Drills: all that is learned stands before, most of it further back than a window."""

import random

import pytest

from hadal.train.drills import drill


@pytest.mark.parametrize("length", [64, 500, 2048])
@pytest.mark.parametrize("seed", range(5))
def test_all_that_is_learned_stands_before(seed, length):
    made = drill(random.Random(seed), range(10, 2000), length)
    assert len(made.ids) == len(made.said) == length
    before: set[tuple[int, int]] = set()
    for at in range(1, length):
        pair = (made.ids[at - 1], made.ids[at])
        assert pair in before or not made.said[at]
        before.add(pair)


def test_most_of_it_is_beyond_a_window():
    learned, far = 0, 0
    for seed in range(20):
        made = drill(random.Random(seed), range(10, 2000), 2048)
        last: dict[tuple[int, int], int] = {}
        for at in range(1, len(made.ids)):
            pair = (made.ids[at - 1], made.ids[at])
            learned += made.said[at]
            far += made.said[at] and at - last[pair] > 128
            last[pair] = at
    assert learned > 0.2 * 20 * 2048
    assert 0.5 < far / learned < 0.95


def test_the_same_draw_makes_the_same_drill():
    one, same, other = (drill(random.Random(seed), range(50), 300) for seed in (1, 1, 2))
    assert one == same
    assert one != other
