"""Level 5: one token is wrong, and a test says so."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

from hadal.tasks.draw import Draw
from hadal.tasks.families.steps import DONE
from hadal.tasks.task import Call, Solution, Task

__all__ = ["fix_function", "fix_name"]


@dataclass(frozen=True)
class _Bug:
    """What a function of `a` and `b` is called, returns, and returns by mistake."""

    name: str
    good: str
    bad: str
    right: Callable[[int, int], object]
    wrong: Callable[[int, int], object]


_BUGS = (
    _Bug("sum", "a + b", "a - b", operator.add, operator.sub),
    _Bug("difference", "a - b", "a + b", operator.sub, operator.add),
    _Bug("product", "a * b", "a + b", operator.mul, operator.add),
    _Bug("larger", "max(a, b)", "min(a, b)", max, min),
    _Bug("smaller", "min(a, b)", "max(a, b)", min, max),
    _Bug("quotient", "a // b", "a * b", operator.floordiv, operator.mul),
    _Bug("remainder", "a % b", "a // b", operator.mod, operator.floordiv),
    _Bug("is_more", "a > b", "a < b", operator.gt, operator.lt),
    _Bug("is_same", "a == b", "a != b", operator.eq, operator.ne),
)


def _message(draw: Draw, module: str, test: str) -> str:
    return draw.ordered(
        (
            "fix $m so that $t passes", "fix the bug in $m that $t shows", "make $t pass by fixing $m",
            "repair $m: the test $t fails", "find and fix the error in $m, for which $t fails",
        ),
        m=module, t=test,
    )  # fmt: skip


def _task(
    draw: Draw, module: str, name: str, code: str, asserts: list[str], hidden: tuple[str, object], solve: Callable[[], Solution],
) -> Task:  # fmt: skip
    """Return a task whose module must pass its test, and give an expression a value that stands in no file."""
    script = f"test_{module}.py"
    test = f"from {module} import {name}\n\n" + "".join(f"{a}\n" for a in asserts) + "print('ok')\n"
    return draw.task(
        5, files={**draw.distractors(), f"{module}.py": code, script: test},
        messages=(_message(draw, f"{module}.py", script),), changed=frozenset({f"{module}.py"}),
        prints={
            f"python3 -B {script}": "ok",
            f"python3 -B -c 'from {module} import {name}; print({hidden[0]})'": str(hidden[1]),
        },
        solve=solve,
    )  # fmt: skip


def fix_function(draw: Draw) -> Task:
    """A wrong operator; the name of the function says what it should do."""
    bug = draw.one_of(_BUGS)
    module, name = draw.word(), f"{bug.name}_{draw.word()}"
    digits = range(1, 10)
    numbers = [(a, b) for a in digits for b in digits]
    telling = [pair for pair in numbers if bug.right(*pair) != bug.wrong(*pair)]
    calls = [(f"{name}({a}, {b})", bug.right(a, b)) for a, b in draw.some(telling, 3)]
    (shown, value), second, _ = calls
    hidden = (  # of all: a constant, or one of the arguments, is right for some
        f"[{name}(a, b) for a in range(1, 10) for b in range(1, 10)]",
        [bug.right(*pair) for pair in numbers],
    )
    asserts = [
        f"got = {shown}",
        f"assert got == {value}, got",
        f"assert {second[0]} == {second[1]}",
    ]

    def solve() -> Solution:
        yield Call.bash("I run the test first.", f"python3 -B test_{module}.py")
        yield Call.edit(f"It fails, so I look at {module}.py.", "view", f"{module}.py")
        yield Call.edit(
            f"{name} should return {bug.good}.", "str_replace", f"{module}.py",
            old_str=f"return {bug.bad}", new_str=f"return {bug.good}",
        )  # fmt: skip
        yield Call.bash("I run the test again.", f"python3 -B test_{module}.py")
        yield DONE

    code = f"def {name}(a, b):\n    return {bug.bad}\n"
    return _task(draw, module, name, code, asserts, hidden, solve)


def fix_name(draw: Draw) -> Task:
    """A name that is not defined; the message says which."""
    module, right, wrong, function = draw.word(), draw.word(), draw.word(), draw.word()
    factor = draw.number(2, 9)
    shown, hidden = draw.some(range(2, 100), 2)

    def solve() -> Solution:
        yield Call.bash("I run the test first.", f"python3 -B test_{module}.py")
        yield Call.edit(f"{wrong} is not defined. I look at {module}.py.", "view", f"{module}.py")
        yield Call.edit(
            f"It should be {right}.", "str_replace", f"{module}.py",
            old_str=f"return {wrong}", new_str=f"return {right}",
        )  # fmt: skip
        yield Call.bash("I run the test again.", f"python3 -B test_{module}.py")
        yield DONE

    return _task(
        draw, module, function, f"def {function}({right}):\n    return {wrong} * {factor}\n",
        [f"assert {function}({shown}) == {factor * shown}"],
        (f"{function}({hidden})", factor * hidden), solve,
    )  # fmt: skip
