"""Level 1: one command, its result in a file or in the tree."""

from collections.abc import Mapping

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import fixed
from hadal.tasks.task import Call, Task

__all__ = [
    "append_line",
    "copy_file",
    "count_lines",
    "count_matches",
    "count_words",
    "first_lines",
    "last_lines",
    "list_files",
    "make_executable",
    "make_folder",
    "matching_lines",
    "move_file",
    "remove_file",
    "reverse_lines",
    "sort_lines",
    "unique_lines",
]


def _task(
    draw: Draw, message: str, thought: str, command: str, files: Mapping[str, str],
    after: Mapping[str, str | None], *, modes: Mapping[str, int] | None = None,
    folders: frozenset[str] = frozenset(), unordered: frozenset[str] = frozenset(),
) -> Task:  # fmt: skip
    return draw.task(
        1, files={**draw.distractors(), **files}, messages=(message,), after=after, modes=modes or {},
        folders=folders, unordered=unordered, solve=fixed(Call.bash(thought, command)),
    )  # fmt: skip


def count_lines(draw: Draw) -> Task:
    """`wc -l`."""
    a, b, lines = draw.file(), draw.file("txt"), draw.lines(2, 12)
    message = draw.wanted(
        ("the number of lines (of|in) $a", "how many lines $a has", "the line count of $a", "the count of the lines in $a"), a=a, b=b
    )  # fmt: skip
    text = "\n".join(lines) + "\n"
    return _task(
        draw,
        message,
        f"I count the lines of {a}.",
        f"wc -l < {a} > {b}",
        {a: text},
        {b: str(len(lines))},
    )


def count_words(draw: Draw) -> Task:
    """`wc -w`."""
    a, b, text = draw.file(), draw.file("txt"), draw.text(1, 5)
    message = draw.wanted(
        ("the number of words (of|in) $a", "how many words $a has", "the word count of $a", "the count of the words in $a"), a=a, b=b
    )  # fmt: skip
    return _task(
        draw,
        message,
        f"I count the words of {a}.",
        f"wc -w < {a} > {b}",
        {a: text},
        {b: str(len(text.split()))},
    )


def _with_word(draw: Draw) -> tuple[str, list[str], list[str]]:
    """Return a word, lines, and those of them that have it."""
    word = draw.word()
    lines = draw.lines(3, 8)
    chosen = set(draw.some(range(len(lines)), draw.number(1, len(lines) - 1)))
    lines = [f"{line} {word}" if at in chosen else line for at, line in enumerate(lines)]
    return word, lines, [line for line in lines if word in line]


def count_matches(draw: Draw) -> Task:
    """`grep -c`."""
    a, b = draw.file(), draw.file("txt")
    word, lines, found = _with_word(draw)
    message = draw.wanted(
        (
            "the number of lines (with|containing) $w in $a", "how many lines of $a contain $w",
            "the count of the lines in $a that contain $w", "the number of lines in $a with $w in them",
        ),
        a=a, b=b, w=word,
    )  # fmt: skip
    return _task(
        draw, message, f"I count the lines with {word} in {a}.", f"grep -c {word} {a} > {b}",
        {a: "\n".join(lines) + "\n"}, {b: str(len(found))},
    )  # fmt: skip


def matching_lines(draw: Draw) -> Task:
    """`grep`."""
    a, b = draw.file(), draw.file("txt")
    word, lines, found = _with_word(draw)
    message = draw.wanted(
        (
            "the lines (with|containing) $w in $a", "the lines of $a that contain $w",
            "all lines in $a that have $w", "every line of $a with $w in it",
        ),
        a=a, b=b, w=word,
    )  # fmt: skip
    return _task(
        draw, message, f"I search {a} for {word}.", f"grep {word} {a} > {b}",
        {a: "\n".join(lines) + "\n"}, {b: "\n".join(found)},
    )  # fmt: skip


def _ends(draw: Draw, which: str, tool: str) -> Task:
    a, b, lines = draw.file(), draw.file("txt"), draw.lines(6, 12)
    n = draw.number(2, 5)
    message = draw.wanted(
        (
            f"the {which} $n lines of $a", f"the {which} $n lines in $a", f"only the {which} $n lines from $a",
            f"$n lines of $a, the {which} ones",
        ),
        a=a, b=b, n=n,
    )  # fmt: skip
    kept = lines[:n] if tool == "head" else lines[-n:]
    return _task(
        draw, message, f"I take the {which} {n} lines of {a}.", f"{tool} -n {n} {a} > {b}",
        {a: "\n".join(lines) + "\n"}, {b: "\n".join(kept)},
    )  # fmt: skip


def first_lines(draw: Draw) -> Task:
    """`head`."""
    return _ends(draw, "first", "head")


def last_lines(draw: Draw) -> Task:
    """`tail`."""
    return _ends(draw, "last", "tail")


def _rewritten(
    draw: Draw, things: tuple[str, ...], done: str, tool: str, lines: list[str], result: list[str]
) -> Task:
    a, b = draw.file(), draw.file("txt")
    return _task(
        draw, draw.wanted(things, a=a, b=b), f"I write the lines of {a} {done}.", f"{tool} {a} > {b}",
        {a: "\n".join(lines) + "\n"}, {b: "\n".join(result)},
    )  # fmt: skip


def sort_lines(draw: Draw) -> Task:
    """`sort`."""
    lines = draw.words(draw.number(3, 8))
    things = (
        "the sorted lines of $a",
        "the lines of $a in order",
        "the lines of $a, sorted",
        "$a sorted by line",
    )
    return _rewritten(draw, things, "sorted", "sort", lines, sorted(lines))


def unique_lines(draw: Draw) -> Task:
    """`sort -u`."""
    words = draw.words(draw.number(2, 4))
    lines = draw.shuffled([w for w in words for _ in range(draw.number(1, 3))])
    things = (
        "the lines of $a sorted without duplicates", "the different lines of $a, sorted",
        "each line of $a once, sorted", "the unique lines of $a in order",
    )  # fmt: skip
    return _rewritten(draw, things, "sorted, each once", "sort -u", lines, sorted(words))


def reverse_lines(draw: Draw) -> Task:
    """`tac`: kept out of training."""
    lines = draw.words(draw.number(3, 6))
    things = (
        "the lines of $a in reverse order",
        "the lines of $a reversed",
        "$a with its last line first",
        "$a backwards by line",
    )
    return _rewritten(draw, things, "in reverse order", "tac", lines, lines[::-1])


def copy_file(draw: Draw) -> Task:
    """`cp`."""
    a, b, text = draw.file(), draw.file(), draw.text(1, 4)
    message = draw.ordered(
        (
            "copy $a to $b", "make a copy of $a called $b", "duplicate $a as $b", "copy the file $a to the new file $b",
            "create $b as a copy of $a",
        ),
        a=a, b=b,
    )  # fmt: skip
    return _task(draw, message, f"I copy {a}.", f"cp {a} {b}", {a: text}, {b: text})


def move_file(draw: Draw) -> Task:
    """`mv`."""
    a, b, text = draw.file(), draw.file(), draw.text(1, 4)
    message = draw.ordered(
        (
            "rename $a to $b", "move $a to $b", "change the name of $a to $b", "give $a the new name $b",
            "rename the file $a; its new name is $b",
        ),
        a=a, b=b,
    )  # fmt: skip
    return _task(draw, message, f"I rename {a}.", f"mv {a} {b}", {a: text}, {a: None, b: text})


def remove_file(draw: Draw) -> Task:
    """`rm`."""
    a, text = draw.file(), draw.text(1, 4)
    message = draw.ordered(
        ("delete $a", "remove $a", "delete the file $a", "remove the file $a", "get rid of $a"), a=a
    )  # fmt: skip
    return _task(draw, message, f"I remove {a}.", f"rm {a}", {a: text}, {a: None})


def make_folder(draw: Draw) -> Task:
    """`mkdir -p`."""
    a, b = draw.words(2)
    message = draw.ordered(
        (
            "make the (directory|folder) $a/$b", "create a (directory|folder) $a/$b",
            "make a new (directory|folder) called $a/$b", "create $a/$b, a (directory|folder)",
        ),
        a=a, b=b,
    )  # fmt: skip
    return _task(
        draw,
        message,
        f"I make the directory {a}/{b}.",
        f"mkdir -p {a}/{b}",
        {},
        {},
        folders=frozenset({f"{a}/{b}"}),
    )


def make_executable(draw: Draw) -> Task:
    """`chmod +x`."""
    a = draw.file("sh")
    message = draw.ordered(
        (
            "make $a executable", "change the mode of $a so that it is executable", "set the executable bit of $a",
            "turn $a into an executable file", "allow $a to be executed",
        ),
        a=a,
    )  # fmt: skip
    return _task(
        draw,
        message,
        f"I make {a} executable.",
        f"chmod +x {a}",
        {a: "#!/bin/sh\necho ok\n"},
        {},
        modes={a: 0o100},
    )


def append_line(draw: Draw) -> Task:
    """`echo >>`."""
    a, text, line = draw.file(), draw.text(1, 4), draw.lines(1, 1)[0]
    message = draw.literally(
        (
            "append this line to $a", "add this line at the end of $a", "add one more line to $a",
            "put this line at the end of $a", "extend $a by this line",
        ),
        line, a=a,
    )  # fmt: skip
    return _task(
        draw,
        message,
        f"I append the line to {a}.",
        f"echo {line} >> {a}",
        {a: text},
        {a: f"{text}{line}"},
    )


def list_files(draw: Draw) -> Task:
    """`ls`."""
    folder, b = draw.word(), draw.file("txt")
    names = [draw.file() for _ in range(draw.number(2, 5))]
    message = draw.wanted(
        (
            "the names of the files in $f", "a list of the files in $f", "the file names of the folder $f",
            "the list of what is in $f",
        ),
        f=folder, b=b,
    )  # fmt: skip
    files = {f"{folder}/{name}": "x\n" for name in names}
    return _task(
        draw,
        message,
        f"I list the files in {folder}.",
        f"ls {folder} > {b}",
        files,
        {b: "\n".join(sorted(names))},
        unordered=frozenset({b}),
    )
