"""Level 5: one token is wrong, and a test says so."""

from dataclasses import dataclass

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import DONE
from hadal.tasks.task import Call, Solution, Task

__all__ = ["fix_function", "fix_name"]


@dataclass(frozen=True)
class _Bug:
    """A line as it should be and as it is, and two calls that tell them apart."""

    good: str
    bad: str
    call: str
    value: str
    hidden_call: str
    hidden_value: str


_BUGS = (
    _Bug("return a + b", "return a - b", "2, 3", "5", "7, 1", "8"),
    _Bug("return a - b", "return a + b", "9, 4", "5", "7, 1", "6"),
    _Bug("return a * b", "return a + b", "2, 3", "6", "4, 4", "16"),
    _Bug("return max(a, b)", "return min(a, b)", "2, 3", "3", "9, 1", "9"),
    _Bug("return min(a, b)", "return max(a, b)", "2, 3", "2", "9, 1", "1"),
    _Bug("return a // b", "return a * b", "8, 2", "4", "9, 3", "3"),
    _Bug("return a % b", "return a // b", "9, 4", "1", "7, 5", "2"),
    _Bug("return a > b", "return a < b", "3, 2", "True", "1, 2", "False"),
    _Bug("return a == b", "return a != b", "3, 3", "True", "1, 2", "False"),
)
_NAMES = {
    "return a + b": "sum", "return a - b": "difference", "return a * b": "product",
    "return max(a, b)": "larger", "return min(a, b)": "smaller", "return a // b": "quotient",
    "return a % b": "remainder", "return a > b": "is_more", "return a == b": "is_same",
}  # fmt: skip


def _message(draw: Draw, module: str, test: str) -> str:
    return draw.ordered(
        (
            "fix $m so that $t passes", "fix the bug in $m that $t shows", "make $t pass by fixing $m",
            "repair $m: the test $t fails", "find and fix the error in $m, for which $t fails",
        ),
        m=module, t=test,
    )  # fmt: skip


def fix_function(draw: Draw) -> Task:
    """A wrong operator; the name of the function says what it should do."""
    bug = draw.one_of(_BUGS)
    module, name = draw.word(), f"{_NAMES[bug.good]}_{draw.word()}"
    code = f"def {name}(a, b):\n    {bug.bad}\n"
    test = (
        f"from {module} import {name}\n\ngot = {name}({bug.call})\n"
        f"assert got == {bug.value}, got\nassert {name}({bug.hidden_call}) == {bug.hidden_value}\nprint('ok')\n"
    )
    script = f"test_{module}.py"

    def solve() -> Solution:
        yield Call.bash("I run the test first.", f"python3 -B {script}")
        yield Call.edit(f"It fails, so I look at {module}.py.", "view", f"{module}.py")
        yield Call.edit(
            f"{name} should {bug.good}.",
            "str_replace",
            f"{module}.py",
            old_str=bug.bad,
            new_str=bug.good,
        )
        yield Call.bash("I run the test again.", f"python3 -B {script}")
        yield DONE

    return draw.task(
        5, files={**draw.distractors(), f"{module}.py": code, script: test},
        messages=(_message(draw, f"{module}.py", script),),
        after={f"{module}.py": code.replace(bug.bad, bug.good)}, solve=solve,
    )  # fmt: skip


def fix_name(draw: Draw) -> Task:
    """A name that is not defined; the message says which."""
    module, right, wrong, function = draw.word(), draw.word(), draw.word(), draw.word()
    factor = draw.number(2, 9)
    code = f"def {function}({right}):\n    return {wrong} * {factor}\n"
    script = f"test_{module}.py"
    test = f"from {module} import {function}\n\nassert {function}(3) == {3 * factor}\nprint('ok')\n"

    def solve() -> Solution:
        yield Call.bash("I run the test first.", f"python3 -B {script}")
        yield Call.edit(f"{wrong} is not defined. I look at {module}.py.", "view", f"{module}.py")
        yield Call.edit(
            f"It should be {right}.", "str_replace", f"{module}.py",
            old_str=f"return {wrong}", new_str=f"return {right}",
        )  # fmt: skip
        yield Call.bash("I run the test again.", f"python3 -B {script}")
        yield DONE

    return draw.task(
        5, files={**draw.distractors(), f"{module}.py": code, script: test},
        messages=(_message(draw, f"{module}.py", script),),
        after={f"{module}.py": code.replace(wrong, right)}, solve=solve,
    )  # fmt: skip
