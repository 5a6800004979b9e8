"""Level 0: do exactly what is written there, with the right tool."""

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import fixed
from hadal.tasks.task import Call, Task

__all__ = ["create_file", "run_command"]


def run_command(draw: Draw) -> Task:
    """A command is given word for word."""
    name, words = draw.file(), draw.lines(1, 1)[0]
    command = f"echo {words} > {name}"
    if draw.chance(0.3):
        command = f"printf '%s\\n' {words} > {name}"
    message = draw.phrase(
        "(Run|Execute|Please run|Do|Type) (this|this command|the command|exactly this|the following): $c",
        "(Have the shell run|Now execute exactly) this (one|line): $c",
        c=command,
    )
    content = words if "echo" in command else words.replace(" ", "\n")
    return Task(
        family=draw.family, level=0, seed=draw.seed, split=draw.split, files=draw.distractors(),
        messages=(message,), after={name: content},
        solve=fixed(Call.bash("I run the command as it is.", command)),
    )  # fmt: skip


def create_file(draw: Draw) -> Task:
    """A file with a given content, for which the editor is the right tool."""
    name, line = draw.file(), draw.lines(1, 1)[0]
    message = draw.phrase(
        "(Create|Make|Write|Please create|Please make) (a file|the file|a new file) (called $n|named $n|$n) "
        "(with the editor|using the editor) (that says|with the text|with the content|containing): $t",
        "(Use the editor to make|With the editor, create) $n (holding|with) (the text|this content): $t",
        n=name, t=line,
    )  # fmt: skip
    step = Call.edit(f"I create {name} with the editor.", "create", name, file_text=line + "\n")
    return Task(
        family=draw.family, level=0, seed=draw.seed, split=draw.split, files=draw.distractors(),
        messages=(message,), after={name: line}, solve=fixed(step),
    )  # fmt: skip
