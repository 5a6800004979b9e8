"""Level 4: commands joined by pipes."""

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import fixed
from hadal.tasks.task import Call, Task

__all__ = ["column_of", "largest", "most_frequent", "rows_of_day"]


def _task(
    draw: Draw, message: str, thought: str, command: str, files: dict[str, str], out: dict[str, str],
    unordered: frozenset[str] = frozenset(),
) -> Task:  # fmt: skip
    return draw.task(
        4, files={**draw.distractors(), **files}, messages=(message,), after=out, unordered=unordered,
        solve=fixed(Call.bash(thought, command)),
    )  # fmt: skip


def most_frequent(draw: Draw) -> Task:
    """The word that a file has most often."""
    a, b = draw.file(), draw.file("txt")
    words = draw.words(draw.number(2, 4))
    counts = [draw.number(3, 4), *(draw.number(1, 2) for _ in words[1:])]
    lines = draw.shuffled([w for w, n in zip(words, counts, strict=True) for _ in range(n)])
    message = draw.wanted(
        (
            "the most frequent line of $a", "the line that $a has most often", "the line which is most frequent in $a",
            "the most common line in $a",
        ),
        a=a, b=b,
    )  # fmt: skip
    return _task(
        draw, message, f"I count equal lines of {a} and take the first.",
        f"sort {a} | uniq -c | sort -rn | head -n 1 | tr -s ' ' | cut -d ' ' -f 3 > {b}",
        {a: "\n".join(lines) + "\n"}, {b: words[0]},
    )  # fmt: skip


def _table(draw: Draw) -> tuple[list[str], list[list[str]]]:
    """Return rows as text and as cells; numbers are as long as each other, so that every order is the same."""
    columns = draw.number(2, 4)
    rows = [
        [draw.word(), *(str(draw.number(100, 999)) for _ in range(columns - 1))]
        for _ in range(draw.number(3, 6))
    ]
    return [",".join(row) for row in rows], rows


def column_of(draw: Draw) -> Task:
    """One column of a table, sorted."""
    a, b = draw.file("csv"), draw.file("txt")
    lines, rows = _table(draw)
    n = draw.number(1, len(rows[0]))
    message = draw.wanted(
        (
            "column $n of $a, sorted", "the sorted column $n of $a", "column $n of the table $a in order",
            "the values of column $n in $a, sorted",
        ),
        a=a, b=b, n=n,
    )  # fmt: skip
    return _task(
        draw, message, f"I cut column {n} of {a} and sort it.", f"cut -d , -f {n} {a} | sort > {b}",
        {a: "\n".join(lines) + "\n"}, {b: "\n".join(sorted(row[n - 1] for row in rows))},
    )  # fmt: skip


def largest(draw: Draw) -> Task:
    """The rows with the largest numbers in the second column."""
    a, b = draw.file("csv"), draw.file("txt")
    numbers = draw.some(range(1, 1000), draw.number(4, 7))
    rows = [f"{draw.word()},{n}" for n in numbers]
    n = draw.number(1, 3)
    message = draw.wanted(
        (
            "the $n rows of $a with the largest numbers", "the $n rows with the largest numbers in $a",
            "the top $n rows of $a by number", "those $n rows of $a that have the largest numbers",
        ),
        a=a, b=b, n=n,
    )  # fmt: skip
    best = sorted(rows, key=lambda row: -int(row.partition(",")[2]))[:n]
    return _task(
        draw, message, f"I sort {a} by number and take the first {n}.",
        f"sort -t , -k 2 -rn {a} | head -n {n} > {b}", {a: "\n".join(rows) + "\n"}, {b: "\n".join(best)},
        unordered=frozenset({b}),
    )  # fmt: skip


def rows_of_day(draw: Draw) -> Task:
    """The messages of one day of a log."""
    a, b = draw.file("log"), draw.file("txt")
    days = [f"2026-{draw.number(1, 12):02}-{d:02}" for d in draw.some(range(1, 29), 3)]
    rows = sorted(f"{draw.one_of(days)} {line}" for line in draw.lines(4, 8))
    day = rows[draw.number(0, len(rows) - 1)][:10]
    message = draw.wanted(
        (
            "the messages of $d in $a without the date", "what $a says for $d, without the date",
            "the messages that $a has for $d, date removed", "all messages of $d from $a without their date",
        ),
        a=a, b=b, d=day,
    )  # fmt: skip
    found = [row[11:] for row in rows if row.startswith(day)]
    return _task(
        draw, message, f"I search {a} for {day} and cut the date off.",
        f"grep ^{day} {a} | cut -d ' ' -f 2- > {b}", {a: "\n".join(rows) + "\n"}, {b: "\n".join(found)},
    )  # fmt: skip
