"""Every family: its solution solves it in a real box, and doing nothing does not."""

import asyncio

import pytest

from hadal.chat import AssistantMessage, UserMessage
from hadal.errors import ConfigError
from hadal.sandbox import AsyncSandbox
from hadal.tasks import FAMILIES, UNSEEN, Call, check, demonstrate, make_task, prepare
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


async def done_as(task, *commands):
    async def do(task, box):
        await prepare(task, box)
        for command in commands:
            await box.run(command)
        return await check(task, box)

    return await in_box(task, do)


@pytest.mark.parametrize(
    ("family", "seed", "commands", "solved"),
    [
        ("column_of", 3, lambda t: [solution(t).replace("| sort", "| sort -n")], True),
        ("make_executable", 1, lambda t: [f"chmod 700 {first(t, '.sh')}"], True),
        ("remove_file", 1, lambda _: ["rm -f *"], False),
        ("fix_name", 1, lambda t: [f"sed -i 's/return.*/return [{argument(t)}][0] * {factor(t)}/' {module(t)}"], True),
        ("fix_name", 1, lambda t: [f"sed -i 's/return.*/return {expected(t)}/' {module(t)}"], False),
        ("fix_name", 1, lambda t: [f"echo 'print(\"ok\")' > test_{module(t)}"], False),
        ("fix_name", 1, lambda t: [f"sed -i 's/return.*/while 1: pass/' {module(t)}"], False),
        ("fix_name", 1050, lambda _: [], False),
        *(("fix_function", seed, lambda t: [returned(t, "1")], False) for seed in range(3)),
        *(("fix_function", seed, lambda t: [returned(t, "True")], False) for seed in range(3)),
        *(("fix_function", seed, lambda t: [returned(t, "a")], False) for seed in range(3)),
        ("largest", 1, lambda t: [solution(t).replace(" > ", " | sort > ")], True),
        ("largest", 1, lambda t: [solution(t).replace("-rn", "-n")], False),
        ("list_files", 1, lambda t: [solution(t).replace("ls ", "ls -r ")], True),
        ("list_files", 1, lambda t: [solution(t).replace("ls ", "ls -a ")], False),
        ("recall_facts", 1, lambda t: [c.replace("printf '%s\\n'", "echo") for c in commands(t)], True),
        ("recall_facts", 1, lambda t: [c.replace("%s", "1%s") for c in commands(t)], False),
        ("copy_file", 1, lambda _: ["mv $PWD /tmp/elsewhere"], False),
        ("fix_name", 1, lambda _: ["rm -r $PWD"], False),
    ],
)  # fmt: skip
def test_other_solutions(node, family, seed, commands, solved):
    """Whatever does it counts, and what only looks like it does not."""
    task = make_task(family, "test", seed)
    outcome = asyncio.run(done_as(task, *commands(task)))
    assert outcome.solved == solved, outcome


def solution(task):
    return next(iter(task.solve())).arguments["command"]


def commands(task):
    return [step.arguments["command"] for step in task.solve() if isinstance(step, Call)]


def returned(task, value):
    return f"sed -i 's/return.*/return {value}/' {module(task)}"


def first(task, end):
    return next(name for name in task.files if name.endswith(end))


def module(task):
    return next(iter(task.changed))


def argument(task):
    return task.files[module(task)].partition("(")[2].partition(")")[0]


def factor(task):
    return task.files[module(task)].rpartition("* ")[2].strip()


def expected(task):
    return task.files[f"test_{module(task)}"].rpartition("== ")[2].partition("\n")[0]


def test_what_is_to_be_written_word_for_word_ends_the_sentence():
    for family in ("run_command", "create_file", "append_line"):
        for split in ("train", "test"):
            for seed in range(100):
                task = make_task(family, split, seed)
                call = next(iter(task.solve()))
                literal = call.arguments.get("file_text") or call.arguments["command"]
                literal = literal.removeprefix("echo ").partition(" >> ")[0].strip()
                assert task.messages[0].endswith(f": {literal}") or family == "run_command"
                assert family != "run_command" or task.messages[0].endswith(f": {solution(task)}")
