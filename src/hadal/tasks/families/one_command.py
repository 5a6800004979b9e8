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

_INTO = "(into|in|to) $b"
_WRITE = "(Write|Put|Save|Store)"


def _task(
    draw: Draw, message: str, thought: str, command: str, files: Mapping[str, str],
    after: Mapping[str, str | None], *, modes: Mapping[str, int] | None = None,
    folders: frozenset[str] = frozenset(),
) -> Task:  # fmt: skip
    return Task(
        family=draw.family, level=1, seed=draw.seed, split=draw.split,
        files={**draw.distractors(), **files}, messages=(message,), after=after, modes=modes or {},
        folders=folders, solve=fixed(Call.bash(thought, command)),
    )  # fmt: skip


def count_lines(draw: Draw) -> Task:
    """`wc -l`."""
    a, b, lines = draw.file(), draw.file("txt"), draw.lines(2, 12)
    message = draw.phrase(
        "(Count the lines of $a and (write|put|save) the number "
        + _INTO
        + f"|How many lines does $a have? {_WRITE} the number {_INTO}"
        + f"|{_WRITE} the number of lines (of|in) $a {_INTO})(.|)",
        "(Find out how many lines $a has, and put the number in $b.|I need the number of lines in $a. Save it to $b.)",
        a=a, b=b,
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
    message = draw.phrase(
        "(Count the words of $a and (write|put|save) the number "
        + _INTO
        + f"|How many words does $a have? {_WRITE} the number {_INTO}"
        + f"|{_WRITE} the number of words (of|in) $a {_INTO})(.|)",
        "(Find out how many words $a has, and put the number in $b.|I need the number of words in $a. Save it to $b.)",
        a=a, b=b,
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
    message = draw.phrase(
        f"(How many lines of $a contain $w? {_WRITE} the number {_INTO}"
        + f"|Count the lines of $a (with|that contain|containing) $w and (write|put|save) the number {_INTO}"
        + f"|{_WRITE} the number of lines (with|that contain|containing) $w in $a {_INTO})(.|)",
        "(Find out how many lines of $a contain $w, and put the number in $b.|Save to $b how many lines in $a contain $w.)",
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
    message = draw.phrase(
        f"(Find the lines of $a (with|that contain|containing) $w and (write|put|save) them {_INTO}"
        + f"|{_WRITE} the lines of $a (with|that contain|containing) $w {_INTO}"
        + f"|Which lines of $a contain $w? {_WRITE} them {_INTO})(.|)",
        "(Search $a for the lines that contain $w, and put them in $b.|Save to $b the lines in $a containing $w.)",
        a=a, b=b, w=word,
    )  # fmt: skip
    return _task(
        draw, message, f"I search {a} for {word}.", f"grep {word} {a} > {b}",
        {a: "\n".join(lines) + "\n"}, {b: "\n".join(found)},
    )  # fmt: skip


def _ends(draw: Draw, which: str, tool: str) -> Task:
    a, b, lines = draw.file(), draw.file("txt"), draw.lines(6, 12)
    n = draw.number(2, 5)
    message = draw.phrase(
        f"({_WRITE} the {which} $n lines of $a {_INTO}"
        f"|Take the {which} $n lines of $a and (write|put|save) them {_INTO}"
        f"|(Copy|Get) the {which} $n lines (of|from) $a {_INTO})(.|)",
        f"(I need the {which} $n lines of $a in $b.|From $a, save only the {which} $n lines to $b.)",
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
    draw: Draw, verb: str, done: str, tool: str, lines: list[str], result: list[str]
) -> Task:
    a, b = draw.file(), draw.file("txt")
    message = draw.phrase(
        f"({verb} the lines of $a and (write|put|save) (them|the result) {_INTO}"
        f"|{_WRITE} the lines of $a {_INTO}, {done}"
        f"|{_WRITE} the {done} lines of $a {_INTO})(.|)",
        f"({verb} $a and save the result to $b.|I need the lines of $a {done} in $b.)",
        a=a, b=b,
    )  # fmt: skip
    return _task(
        draw, message, f"I write the lines of {a} {done}.", f"{tool} {a} > {b}",
        {a: "\n".join(lines) + "\n"}, {b: "\n".join(result)},
    )  # fmt: skip


def sort_lines(draw: Draw) -> Task:
    """`sort`."""
    lines = draw.words(draw.number(3, 8))
    return _rewritten(draw, "Sort", "sorted", "sort", lines, sorted(lines))


def unique_lines(draw: Draw) -> Task:
    """`sort -u`."""
    words = draw.words(draw.number(2, 4))
    lines = draw.shuffled([w for w in words for _ in range(draw.number(1, 3))])
    return _rewritten(
        draw, "Sort and deduplicate", "sorted without duplicates", "sort -u", lines, sorted(words)
    )


def reverse_lines(draw: Draw) -> Task:
    """`tac`: kept out of training."""
    lines = draw.words(draw.number(3, 6))
    return _rewritten(draw, "Reverse", "in reverse order", "tac", lines, lines[::-1])


def copy_file(draw: Draw) -> Task:
    """`cp`."""
    a, b, text = draw.file(), draw.file(), draw.text(1, 4)
    message = draw.phrase(
        "((Copy|Please copy) $a to $b|(Make|Create) a copy of $a (called|named) $b|Duplicate $a as $b)(.|)",
        "(I need a copy of $a with the name $b.|Copy the file $a; call the copy $b.)",
        a=a, b=b,
    )  # fmt: skip
    return _task(draw, message, f"I copy {a}.", f"cp {a} {b}", {a: text}, {b: text})


def move_file(draw: Draw) -> Task:
    """`mv`."""
    a, b, text = draw.file(), draw.file(), draw.text(1, 4)
    message = draw.phrase(
        "((Rename|Please rename) $a to $b|(Move|Please move) $a to $b|Change the name of $a to $b)(.|)",
        "(The file $a is to be renamed to $b.|Give $a another name: $b.)",
        a=a, b=b,
    )  # fmt: skip
    return _task(draw, message, f"I rename {a}.", f"mv {a} {b}", {a: text}, {a: None, b: text})


def remove_file(draw: Draw) -> Task:
    """`rm`."""
    a, text = draw.file(), draw.text(1, 4)
    message = draw.phrase(
        "((Delete|Remove|Please delete|Please remove) (the file |)$a|$a is not needed(| any more), (delete|remove) it)(.|)",
        "(Get rid of $a: remove it.|The file $a must be deleted.)",
        a=a,
    )
    return _task(draw, message, f"I remove {a}.", f"rm {a}", {a: text}, {a: None})


def make_folder(draw: Draw) -> Task:
    """`mkdir -p`."""
    a, b = draw.words(2)
    message = draw.phrase(
        "((Make|Create|Please make|Please create) (a|the) (directory|folder) $a/$b)(.|)",
        "(I need a (directory|folder) $a/$b.|There must be a (directory|folder) called $a/$b: make it.)",
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
    message = draw.phrase(
        "((Make|Please make) $a executable|Change the mode of $a so that it (is|becomes) executable)(.|)",
        "(The file $a must be executable: change its mode.|$a is to become executable.)",
        a=a,
    )
    return _task(
        draw,
        message,
        f"I make {a} executable.",
        f"chmod +x {a}",
        {a: "#!/bin/sh\necho ok\n"},
        {},
        modes={a: 0o755},
    )


def append_line(draw: Draw) -> Task:
    """`echo >>`."""
    a, text, line = draw.file(), draw.text(1, 4), draw.lines(1, 1)[0]
    message = draw.phrase(
        "((Append|Add) (the line|a line|this line) (at the end of|to) $a: $t)",
        "(At the end of $a, add this line: $t|$a needs one more line at its end: $t)",
        a=a, t=line,
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
    message = draw.phrase(
        f"(List the files (in|of) $f and (write|put|save) (the names|the list) {_INTO}"
        f"|{_WRITE} the names of the files in $f {_INTO}"
        f"|Which files are in $f? {_WRITE} (the names|the list) {_INTO})(.|)",
        "(I need the names of the files of $f in $b.|Save to $b a list of the files in $f.)",
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
    )
