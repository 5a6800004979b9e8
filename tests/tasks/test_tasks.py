"""Every family: its solution solves it in a real box, and doing nothing does not."""

import asyncio

import pytest

from hadal.chat import AssistantMessage, UserMessage
from hadal.errors import ConfigError
from hadal.sandbox import AsyncSandbox
from hadal.tasks import FAMILIES, UNSEEN, check, demonstrate, make_task, prepare
from hadal.tasks.draw import pairs


async def in_box(task, function):
    async with await AsyncSandbox.create(task.spec) as box:
        return await function(task, box)


async def nothing(task, box):
    await prepare(task, box)
    return await check(task, box)


@pytest.mark.parametrize("family", [*FAMILIES, *UNSEEN])
def test_solutions_solve(node, family):
    async def whole():
        for split in ("train", "test"):
            if split == "train" and family in UNSEEN:
                continue
            for seed in range(4):
                task = make_task(family, split, seed)
                done = await in_box(task, demonstrate)
                assert done.outcome.solved, (task, done)
                said = [m for m in done.messages if isinstance(m, UserMessage)]
                assert [m.content for m in said] == list(task.messages)
                last = done.messages[-1]
                assert isinstance(last, AssistantMessage)
                assert not last.tool_calls
                assert not (await in_box(task, nothing)).solved

    asyncio.run(whole())


def test_the_same_seed_makes_the_same_task():
    for family in FAMILIES:
        one, same, other = (make_task(family, "train", seed) for seed in (1, 1, 2))
        assert (one.files, one.messages, one.after) == (same.files, same.messages, same.after)
        assert (one.files, one.messages) != (other.files, other.messages)


def test_no_phrasing_is_left_open():
    for family in [*FAMILIES, *UNSEEN]:
        for seed in range(50):
            task = make_task(family, "test", seed)
            for message in task.messages:
                assert not set("|$") & set(message), message
                assert "  " not in message, message


def test_splits_do_not_share_messages():
    for family in FAMILIES:
        trained = {m for seed in range(300) for m in make_task(family, "train", seed).messages}
        for seed in range(100):
            assert not trained & set(make_task(family, "test", seed).messages[:1])


@pytest.mark.parametrize("cores", [4, 5, 6])
def test_test_phrasings_are_kept_out_of_training(cores):
    frames, cores = [f"f{n}" for n in range(12)], [f"c{n}" for n in range(cores)]
    for family in FAMILIES:
        train, test = (set(pairs(family, split, frames, cores)) for split in ("train", "test"))
        assert not train & test
        assert len(train | test) == len(frames) * len(cores)
        assert len(test) == len(train) / 3
        for kept in (train, test):
            assert {f for f, _ in kept} == set(frames) or kept is test
            assert {c for _, c in kept} == set(cores)


def test_unseen_families_are_not_trained_on():
    with pytest.raises(ConfigError, match="no family of tasks"):
        make_task("count_words", "train", 1)
