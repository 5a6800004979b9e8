"""Doing a task as its solution says, in a real box: what is said and what the tools return."""

import json
from dataclasses import dataclass

from hadal.chat import AssistantMessage, Message, Tool, ToolCall, ToolMessage, UserMessage
from hadal.sandbox import AsyncSandbox
from hadal.tasks.task import Answer, Outcome, Task, check, prepare
from hadal.tools import BashTool, EditorTool, Toolbox

__all__ = ["TOOLS", "Demonstration", "demonstrate"]

TOOLS: tuple[Tool, ...] = (BashTool.declare(), EditorTool.declare())
"""What is there to do tasks with."""


@dataclass(frozen=True)
class Demonstration:
    """A task that was done.

    Attributes:
        messages: From the user's first on; every result is what a box returned.
        outcome: Of the check.
    """

    messages: tuple[Message, ...]
    outcome: Outcome


async def demonstrate(task: Task, box: AsyncSandbox) -> Demonstration:
    """Prepare a fresh box for a task, do it, and check it.

    Raises:
        SandboxError: The box failed.
    """
    await prepare(task, box)
    toolbox = Toolbox([BashTool(box), EditorTool(box)])
    messages: list[Message] = []
    asked = iter(task.messages)
    steps = task.solve()
    said = None
    while True:
        try:
            step = next(steps) if said is None else steps.send(said)
        except StopIteration:
            break
        if said is None:
            messages.append(UserMessage(next(asked)))
        if isinstance(step, Answer):
            messages.append(AssistantMessage(step.text, reasoning_content=step.thought))
            said = None
            continue
        call = ToolCall(step.tool, json.dumps(dict(step.arguments)), id=f"call-{len(messages)}")
        messages.append(AssistantMessage("", reasoning_content=step.thought, tool_calls=(call,)))
        said = (await toolbox.call(call, f"{task.name}/{call.id}")).text
        messages.append(ToolMessage(said, call.id))
    return Demonstration(tuple(messages), await check(task, box))
