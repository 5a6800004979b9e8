"""Tasks with a check: what an agent is asked to do in a box, and whether it has done it.

Every family is a generator of tasks, each with files, messages, a solution, and what the files must be
afterwards. The check looks at the box, never at what was said.
"""

from hadal.tasks.curriculum import FAMILIES, UNSEEN, make_task, named_task
from hadal.tasks.demonstration import TOOLS, Demonstration, demonstrate
from hadal.tasks.task import Answer, Call, Outcome, Solution, Split, Task, check, prepare

__all__ = [
    "FAMILIES",
    "TOOLS",
    "UNSEEN",
    "Answer",
    "Call",
    "Demonstration",
    "Outcome",
    "Solution",
    "Split",
    "Task",
    "check",
    "demonstrate",
    "make_task",
    "named_task",
    "prepare",
]
