"""Level 6: what was thought in the first turn is needed in the last."""

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import DONE
from hadal.tasks.task import Answer, Call, Solution, Task

__all__ = ["carry_choice", "recall_fact", "recall_facts"]


def carry_choice(draw: Draw) -> Task:
    """Something is found out at first, named in the reasoning alone, and asked for turns later.

    The file it came from is gone by then, and the answer was told to nobody. A command finds it: what is
    measured is memory, not comparing numbers in one's head. What that command printed stays in the context.
    """
    table, out = draw.file("csv"), draw.file("txt")
    names = draw.words(draw.number(3, 4))
    numbers = draw.some(range(100, 1000), len(names))
    best = max(zip(numbers, names, strict=True))[1]
    rows = "".join(f"{n},{v}\n" for n, v in zip(names, numbers, strict=True))
    chores = [draw.file() for _ in range(draw.number(4, 6))]
    first = draw.ordered(
        (
            "read $t, keep in mind which name has the largest number, and delete $t",
            "find out which name in $t has the largest number, remember it for later, and delete $t",
            "look at $t, keep the name with the largest number in mind, then remove $t",
            "remember which name of $t has the largest number, but do not tell me, and delete $t",
        ),
        t=table,
    )
    last = draw.wanted(
        (
            "the name that you kept in mind", "the name that you remember", "the name with the largest number",
            "that name from the beginning",
        ),
        b=out,
    )  # fmt: skip

    def solve() -> Solution:
        yield Call.bash(f"I sort {table} by number.", f"sort -t , -k 2 -rn {table}")
        yield Call.bash(f"The largest number has {best}. I keep {best} in mind.", f"rm {table}")
        yield Answer("I do not tell it.", "I keep it in mind.")
        for chore in chores:
            yield Call.bash(f"I make {chore}.", f"touch {chore}")
            yield DONE
        yield Call.bash(f"I kept {best} in mind.", f"echo {best} > {out}")
        yield DONE

    empty = (
        "make an empty file $c",
        "create the empty file $c",
        "make a new file $c with nothing in it",
        "touch $c",
    )
    asked = (draw.ordered(empty, c=c) for c in chores)
    return draw.task(
        6, files={table: rows},
        messages=(first, *asked, last), after={table: None, out: best} | dict.fromkeys(chores, ""), solve=solve,
    )  # fmt: skip


def recall_fact(draw: Draw, distance: int = 0) -> Task:
    """A fact that the user told is needed after a text of some length.

    Args:
        draw: Its choices.
        distance: Words between; 0 for some, of any order of magnitude up to 5,500. A few fixed distances
            would be learned as such, and nothing between them.
    """
    key, value, out = draw.word(), str(draw.number(1000, 9999)), draw.file("txt")
    filler = draw.prose(distance or draw.magnitude(10, 5500))
    told = draw.ordered(
        (
            "keep in mind that the number of $k is $v", "remember that the number of $k is $v",
            "note this: the number of $k is $v", "remember $v, the number of $k",
        ),
        k=key, v=value,
    )  # fmt: skip
    asked = draw.wanted(
        ("the number of $k", "the number that I told you for $k", "what the number of $k is", "the number $k has"),
        k=key, b=out,
    )  # fmt: skip

    def solve() -> Solution:
        yield Answer("I keep it in mind.", "I keep it in mind.")
        yield Answer("There is nothing to do.", "Noted.")
        yield Call.bash(f"The number of {key} is {value}.", f"echo {value} > {out}")
        yield DONE

    return draw.task(
        6, files={},
        messages=(told, f"Some notes: {filler}", asked), after={out: value}, solve=solve,
    )  # fmt: skip


def recall_facts(draw: Draw) -> Task:
    """Many facts stand in a text, and are asked for a few at a time.

    What one fact in a long text teaches is one token of thousands; here every turn has some.
    """
    keys = draw.words(draw.number(6, 20))
    numbers = dict(zip(keys, (str(draw.number(1000, 9999)) for _ in keys), strict=True))
    between = draw.magnitude(1, 300)
    notes = " ".join(
        f"{draw.prose(draw.number(0, between))} the number of {k} is {v}.".lstrip()
        for k, v in numbers.items()
    )
    told = draw.literally(
        ("keep in mind what these notes say", "remember these notes", "read these notes", "note this"), notes
    )  # fmt: skip
    turns = [draw.some(keys, draw.number(1, 4)) for _ in range(draw.number(3, 6))]
    outs = [draw.file("txt") for _ in turns]
    asked = [
        draw.wanted(
            ("the number(s|) of $k", "what the numbers of $k are", "the number(s|) that the notes have for $k", "the number of each of $k"),
            k=", ".join(some), b=out,
        )
        for some, out in zip(turns, outs, strict=True)
    ]  # fmt: skip

    def solve() -> Solution:
        yield Answer("I keep it in mind.", "I keep it in mind.")
        for some, out in zip(turns, outs, strict=True):
            thought = " ".join(f"The number of {key} is {numbers[key]}." for key in some)
            found = " ".join(numbers[key] for key in some)
            yield Call.bash(thought, f"printf '%s\\n' {found} > {out}")
            yield DONE

    lines = ("\n".join(numbers[key] for key in some) for some in turns)
    return draw.task(
        6, files={}, messages=(told, *asked),
        after=dict(zip(outs, lines, strict=True)), words=frozenset(outs), solve=solve,
    )  # fmt: skip
