"""Level 3: the first try fails, and the message says what to do about it."""

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import DONE
from hadal.tasks.task import Call, Solution, Task

__all__ = ["missing_flag", "missing_folder", "not_executable", "wrong_place"]


def not_executable(draw: Draw) -> Task:
    """Permission denied."""
    script, out, word = draw.file("sh"), draw.file("txt"), draw.word()
    message = draw.ordered(
        (
            "run ./$s and write its output to $o", "execute ./$s and save the output in $o",
            "write the output of ./$s to $o", "start ./$s and put what it says into $o", "save what ./$s prints to $o",
        ),
        s=script, o=out,
    )  # fmt: skip
    broken = draw.chance(0.7)
    command = f"./{script} > {out}"

    def solve() -> Solution:
        said = yield Call.bash(f"I run {script}.", command)
        if "Permission denied" in said:
            yield Call.bash("Permission denied: it is not executable.", f"chmod +x {script}")
            yield Call.bash("I run it again.", command)
        yield DONE

    return draw.task(
        3, files={**draw.distractors(), script: f"#!/bin/sh\necho {word}\n"},
        executable=frozenset() if broken else frozenset({script}), messages=(message,),
        after={out: word}, solve=solve,
    )  # fmt: skip


def missing_folder(draw: Draw) -> Task:
    """No such directory."""
    a, folder, text = draw.file(), draw.word(), draw.text(1, 3)
    there = draw.chance(0.3)
    message = draw.ordered(
        (
            "copy $a into $f/", "put a copy of $a into $f/", "copy the file $a into the (directory|folder) $f",
            "make a copy of $a in the (directory|folder) $f", "place a copy of $a in $f/",
        ),
        a=a, f=folder,
    )  # fmt: skip
    files = {**draw.distractors(), a: text} | ({f"{folder}/{draw.file()}": "x\n"} if there else {})

    def solve() -> Solution:
        said = yield Call.bash(f"I copy {a}.", f"cp {a} {folder}/")
        if "[exit code" in said:
            yield Call.bash(f"There is no directory {folder}.", f"mkdir {folder}")
            yield Call.bash("I copy it again.", f"cp {a} {folder}/")
        yield DONE

    return draw.task(
        3, files=files,
        messages=(message,), after={f"{folder}/{a}": text}, solve=solve,
    )  # fmt: skip


def wrong_place(draw: Draw) -> Task:
    """The file is not where one looks first."""
    a, out, text = draw.file(), draw.file(), draw.text(1, 3)
    folder = draw.word()
    hidden = draw.chance(0.7)
    place = f"{folder}/{a}" if hidden else a
    message = draw.ordered(
        (
            "copy $a, wherever it is, to $o", "find $a and copy it to $o", "look for $a and make a copy of it called $o",
            "search for $a and copy it to $o", "make $o a copy of $a, which is somewhere here",
        ),
        a=a, o=out,
    )  # fmt: skip

    def solve() -> Solution:
        said = yield Call.bash(f"I copy {a}.", f"cp {a} {out}")
        if "[exit code" in said:
            found = (
                yield Call.bash("It is not here, so I look for it.", f"find . -name {a}")
            ).strip()
            yield Call.bash(f"It is {found}.", f"cp {found} {out}")
        yield DONE

    return draw.task(
        3, files={**draw.distractors(), place: text}, messages=(message,), after={out: text}, solve=solve,
    )  # fmt: skip


def missing_flag(draw: Draw) -> Task:
    """A program says how it wants to be called."""
    script, out, flag, value = draw.file("sh"), draw.file("txt"), draw.word(), draw.word()
    program = (
        "#!/bin/sh\n"
        f'if [ "$1" != --{flag} ]; then echo "usage: {script} --{flag} {value}"; exit 2; fi\n'
        f'echo "$2" > {out}\n'
    )
    message = draw.ordered(
        (
            "run ./$s, which makes $o", "make $o with ./$s", "let ./$s write $o", "use ./$s to make $o",
            "execute ./$s so that it writes $o",
        ),
        s=script, o=out,
    )  # fmt: skip

    def solve() -> Solution:
        said = yield Call.bash(f"I run {script}.", f"./{script}")
        options = said.partition(f"{script} ")[2].splitlines()[0]
        yield Call.bash(f"It wants {options}.", f"./{script} {options}")
        yield DONE

    return draw.task(
        3, files={**draw.distractors(), script: program}, executable=frozenset({script}),
        messages=(message,), after={out: value}, solve=solve,
    )  # fmt: skip
