"""Level 2: what a file says decides what has to be done."""

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import DONE
from hadal.tasks.task import Call, Solution, Task

__all__ = ["follow_pointer", "remove_named", "rename_to_content", "set_key", "set_key_with_editor"]


def follow_pointer(draw: Draw) -> Task:
    """A file names the file that is to be copied."""
    pointer, target, out = draw.file(), draw.file(), draw.file("txt")
    text = draw.text(1, 3)
    message = draw.ordered(
        (
            "copy the file that $p names to $o", "read $p, which names a file, and copy that file to $o",
            "look into $p for a file name and copy that file to $o", "make $o a copy of the file named in $p",
            "find out which file $p names, and copy it to $o",
        ),
        p=pointer, o=out,
    )  # fmt: skip

    def solve() -> Solution:
        name = (yield Call.bash(f"I read {pointer} first.", f"cat {pointer}")).strip()
        yield Call.bash(f"It names {name}, so I copy that.", f"cp {name} {out}")
        yield DONE

    return draw.task(
        2, files={**draw.distractors(), pointer: f"{target}\n", target: text}, messages=(message,),
        after={out: text}, solve=solve,
    )  # fmt: skip


def remove_named(draw: Draw) -> Task:
    """A file names the one of several files that is to go."""
    pointer = draw.file()
    names = [draw.file() for _ in range(draw.number(2, 4))]
    target = draw.one_of(names)
    message = draw.ordered(
        (
            "delete the file that $p names", "remove the file whose name is in $p", "read $p and delete the file that it names",
            "look into $p for a file name and remove that file", "delete what $p names",
        ),
        p=pointer,
    )  # fmt: skip

    def solve() -> Solution:
        name = (yield Call.bash(f"I read {pointer} first.", f"cat {pointer}")).strip()
        yield Call.bash(f"It names {name}, so I remove that.", f"rm {name}")
        yield DONE

    files = {pointer: f"{target}\n"} | {name: draw.text(1, 2) for name in names}
    return draw.task(
        2, files=files,
        messages=(message,), after={target: None}, solve=solve,
    )  # fmt: skip


def rename_to_content(draw: Draw) -> Task:
    """A file says under which name another one is to go on."""
    pointer, old, new = draw.file(), draw.file(), draw.file()
    text = draw.text(1, 3)
    message = draw.ordered(
        (
            "rename $a to the name in $p", "read $p, which holds a name, and rename $a to it",
            "give $a the name that $p says", "look into $p for the new name of $a and rename it",
            "rename $a as $p says",
        ),
        a=old, p=pointer,
    )  # fmt: skip

    def solve() -> Solution:
        name = (yield Call.bash(f"I read {pointer} first.", f"cat {pointer}")).strip()
        yield Call.bash(f"The new name is {name}.", f"mv {old} {name}")
        yield DONE

    return draw.task(
        2, files={**draw.distractors(), pointer: f"{new}\n", old: text}, messages=(message,),
        after={old: None, new: text}, solve=solve,
    )  # fmt: skip


def _settings(draw: Draw) -> tuple[list[str], str, int, int]:
    """Return the lines of a settings file, a key of it, its value, and another one."""
    keys = draw.words(draw.number(2, 4))
    key, old, new = draw.one_of(keys), draw.number(10, 9999), draw.number(10, 9999)
    lines = [f"{k}={old if k == key else draw.number(10, 9999)}" for k in keys]
    return lines, key, old, new


def set_key(draw: Draw) -> Task:
    """A number in one file becomes a setting in another, with sed."""
    config, source = draw.file("ini"), draw.file("txt")
    lines, key, old, new = _settings(draw)
    message = draw.ordered(
        (
            "set $k in $c to the number in $s", "read the number in $s and set $k in $c to it",
            "take the number from $s and make it the value of $k in $c", "change $k in $c to the number that $s holds",
            "make $k in $c equal to the number from $s",
        ),
        k=key, c=config, s=source,
    )  # fmt: skip

    def solve() -> Solution:
        value = (yield Call.bash(f"I read {source} first.", f"cat {source}")).strip()
        yield Call.bash(f"I set {key} to {value}.", f"sed -i 's/^{key}=.*/{key}={value}/' {config}")
        yield DONE

    text = "\n".join(lines) + "\n"
    return draw.task(
        2, files={**draw.distractors(), config: text, source: f"{new}\n"}, messages=(message,),
        after={config: text.replace(f"{key}={old}\n", f"{key}={new}\n")}, solve=solve,
    )  # fmt: skip


def set_key_with_editor(draw: Draw) -> Task:
    """A setting is looked at, then changed with the editor."""
    config = draw.file("ini")
    lines, key, old, new = _settings(draw)
    message = draw.ordered(
        (
            "use the editor to set $k in $c to $n", "change $k in $c to $n with the editor",
            "edit $c with the editor so that $k is $n", "open $c in the editor and set $k to $n",
            "with the editor, make $n the value of $k in $c",
        ),
        k=key, c=config, n=new,
    )  # fmt: skip

    def solve() -> Solution:
        seen = yield Call.edit(f"I look at {config}.", "view", config)
        line = next(
            x for row in seen.splitlines() if (x := row.partition("\t")[2]).startswith(f"{key}=")
        )
        yield Call.edit(
            f"I replace {line}.", "str_replace", config, old_str=line, new_str=f"{key}={new}"
        )
        yield DONE

    text = "\n".join(lines) + "\n"
    return draw.task(
        2, files={**draw.distractors(), config: text}, messages=(message,),
        after={config: text.replace(f"{key}={old}\n", f"{key}={new}\n")}, solve=solve,
    )  # fmt: skip
