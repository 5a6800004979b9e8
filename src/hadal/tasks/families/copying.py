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
    message = draw.literally(
        (
            "run this command", "execute this", "run exactly this", "type this into the shell",
            "run the following line", "execute the following command",
        ),
        command,
    )  # fmt: skip
    content = words if "echo" in command else words.replace(" ", "\n")
    return draw.task(
        0, files=draw.distractors(),
        messages=(message,), after={name: content},
        solve=fixed(Call.bash("I run the command as it is.", command)),
    )  # fmt: skip


def create_file(draw: Draw) -> Task:
    """A file with a given content, for which the editor is the right tool."""
    name, line = draw.file(), draw.lines(1, 1)[0]
    message = draw.literally(
        (
            "use the editor to create $n with the text", "create $n with the editor, containing",
            "make a file $n with the editor that says", "write a new file $n with the editor and this content",
            "create a file called $n using the editor, with this text",
        ),
        line, n=name,
    )  # fmt: skip
    step = Call.edit(f"I create {name} with the editor.", "create", name, file_text=line + "\n")
    return draw.task(
        0, files=draw.distractors(),
        messages=(message,), after={name: line}, solve=fixed(step),
    )  # fmt: skip
