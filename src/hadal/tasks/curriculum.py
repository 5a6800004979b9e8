"""All families, by name: which are trained on, and which are kept out."""

from collections.abc import Callable

from hadal.errors import ConfigError
from hadal.tasks.draw import Draw
from hadal.tasks.families import (
    carrying,
    copying,
    fixing,
    one_command,
    pipelines,
    read_then_act,
    recovering,
)
from hadal.tasks.task import Split, Task

__all__ = ["FAMILIES", "UNSEEN", "make_task", "named_task"]

FAMILIES: dict[str, Callable[[Draw], Task]] = {
    make.__name__: make
    for make in (
        copying.run_command,
        copying.create_file,
        one_command.count_lines,
        one_command.count_matches,
        one_command.matching_lines,
        one_command.first_lines,
        one_command.last_lines,
        one_command.sort_lines,
        one_command.unique_lines,
        one_command.copy_file,
        one_command.move_file,
        one_command.remove_file,
        one_command.make_folder,
        one_command.make_executable,
        one_command.append_line,
        one_command.list_files,
        read_then_act.follow_pointer,
        read_then_act.remove_named,
        read_then_act.rename_to_content,
        read_then_act.set_key,
        read_then_act.set_key_with_editor,
        recovering.not_executable,
        recovering.missing_folder,
        recovering.wrong_place,
        recovering.missing_flag,
        pipelines.most_frequent,
        pipelines.column_of,
        pipelines.largest,
        pipelines.rows_of_day,
        fixing.fix_function,
        fixing.fix_name,
        carrying.carry_choice,
        carrying.recall_fact,
        carrying.recall_facts,
    )
}
"""Families that are trained on."""

UNSEEN: dict[str, Callable[[Draw], Task]] = {
    make.__name__: make for make in (one_command.count_words, one_command.reverse_lines)
}
"""Families that no training has seen."""


def make_task(family: str, split: Split, seed: int) -> Task:
    """Return a task; the same arguments make the same one.

    Raises:
        ConfigError: There is no such family, or it is not to be trained on.
    """
    make = (FAMILIES if split == "train" else FAMILIES | UNSEEN).get(family)
    if make is None:
        raise ConfigError(
            f"no family of tasks {family!r} in split {split!r}",
            hint=f"there are {', '.join(FAMILIES)}; and for tests {', '.join(UNSEEN)}",
        )
    return make(Draw(family, split, seed))


def named_task(name: str) -> Task:
    """Return a task by its name, FAMILY/SPLIT/SEED.

    Raises:
        ConfigError: It is no such name, or there is no such family.
    """
    family, _, rest = name.partition("/")
    split, _, seed = rest.partition("/")
    if split not in ("train", "test") or not seed.isdecimal():
        raise ConfigError(
            f"expected a task as FAMILY/SPLIT/SEED, got {name!r}", hint="as count_lines/test/7"
        )
    return make_task(family, split, int(seed))
