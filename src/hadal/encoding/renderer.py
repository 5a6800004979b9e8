"""Rendering: merged messages to a list of control tokens and texts.

One renderer serves both faces. The strict face hands it a client's messages as they are; the
default face hands it messages that `repair` has put into good shape, and asks for complete
hand-offs (an assistant turn always opens with its marker). See docs/formats/encoding.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hadal.encoding.dsml import CallWriter, json_text, parameters_of
from hadal.encoding.generations import Effort, Generation
from hadal.encoding.passes import Dict, drop_reasoning, has_tools, last_user_index, merge
from hadal.encoding.passes import sort_results as sort
from hadal.encoding.tokens import (
    ACTION,
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    LATEST_REMINDER,
    SYSTEM,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
    split_trusted,
)
from hadal.errors import ConfigError, InvalidConversationError

__all__ = ["RenderSettings", "Renderer"]

_TOOLS_HEAD: Final = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<｜DSML｜{block}>" block like the following:

<｜DSML｜{block}>
<｜DSML｜{invoke} name="$TOOL_NAME">
<｜DSML｜{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜{parameter}>
...
</｜DSML｜{invoke}>
<｜DSML｜{invoke} name="$TOOL_NAME2">
...
</｜DSML｜{invoke}>
</｜DSML｜{block}>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_TAIL: Final = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke "
    "tool calls.\n"
)
_RESPONSE_FORMAT: Final = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """What applies to a whole conversation.

    Attributes:
        mode: "thinking" or "chat".
        effort: How hard to think; None for the generation's default.
        drop_thinking: Drop the reasoning of turns before the last user turn, unless tools are
            declared.
        bos: Begin with the beginning-of-sentence token (never after a context).
        generation_prompt: Open the next assistant turn: None as the reference does (after user
            turns), True always, False never.
        strict: As the reference does it. Otherwise every assistant turn opens with its marker,
            whatever came before it, and arguments that are no object are shown as they are.
    """

    mode: str = "thinking"
    effort: Effort = None
    drop_thinking: bool = True
    bos: bool = True
    generation_prompt: bool | None = None
    strict: bool = False


class Renderer:
    """Renders conversations in the format of one generation."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.calls = CallWriter(generation.tags)
        tags = generation.tags
        self._tools_head = split_trusted(
            _TOOLS_HEAD.format(block=tags.block, invoke=tags.invoke, parameter=tags.parameter)
        )

    def render(
        self,
        messages: Sequence[Dict],
        settings: RenderSettings,
        *,
        context: Sequence[Dict] = (),
    ) -> list[str]:
        """Render messages as items: `Control` tokens and texts. Joined, they are the prompt.

        Args:
            messages: As dicts with the reference's keys; not changed.
            settings: Of the conversation.
            context: Messages rendered before, which are looked at but not rendered again.

        Raises:
            ConfigError: Unknown mode or effort.
            InvalidConversationError: A message that cannot be rendered.
        """
        if settings.mode not in ("thinking", "chat"):
            raise ConfigError(f"unknown mode: expected 'thinking' or 'chat', got {settings.mode!r}")
        effort_text = self.generation.effort_text(settings.effort)
        thinking = settings.mode == "thinking"
        old = merge(context)
        turns = sort([*old, *merge(messages)])
        first_new = len(old)
        drop = thinking and settings.drop_thinking and not has_tools(turns)
        if drop:
            last = last_user_index(turns, system_is_user=self.generation.has_system_token)
            survivors = drop_reasoning(turns, last_user=last)
            first_new = sum(index < first_new for index, _ in survivors)
            turns = [turn for _, turn in survivors]
        out: list[str] = [BOS] if settings.bos and not old else []
        conversation = _Conversation(self, turns, settings, drop=drop)
        if thinking and first_new == 0 and turns:
            if effort_text and self.generation.has_system_token:
                out.append(SYSTEM)
            out.append(effort_text)
        for index in range(first_new, len(turns)):
            conversation.turn(out, index)
        conversation.handoff_at_end(out)
        return out

    def tools_block(self, out: list[str], tools: Sequence[Mapping[str, Any]]) -> None:
        """Write the instructions for calling tools, and one JSON line for each of them."""
        out += self._tools_head
        try:
            out.append("\n".join(json_text(tool["function"]) for tool in tools))
        except (KeyError, TypeError) as err:
            raise InvalidConversationError(
                "tools: expected objects with a JSON-serialisable `function`",
                hint='{"type": "function", "function": {"name": ..., "parameters": ...}}',
            ) from err
        out.append(_TOOLS_TAIL)


class _Conversation:
    """One rendering: the turns that survived the passes, and where the last user turn is."""

    def __init__(
        self, renderer: Renderer, turns: list[Dict], settings: RenderSettings, *, drop: bool
    ) -> None:
        self.renderer = renderer
        self.generation = renderer.generation
        self.turns = turns
        self.settings = settings
        self.thinking = settings.mode == "thinking"
        self.drop = drop
        self.last_user = last_user_index(turns, system_is_user=self.generation.has_system_token)

    def turn(self, out: list[str], index: int) -> None:
        """Write one message and, where it is due, the hand-off to the assistant."""
        message = self.turns[index]
        match message.get("role"):
            case "system":
                self._system(out, index)
            case "developer":
                self._developer(out, message)
            case "user":
                out.append(USER)
                self._blocks(out, message["blocks"])
            case "latest_reminder":
                out += [LATEST_REMINDER, str(message.get("content"))]
            case "assistant":
                self._assistant(out, index)
            case role:
                raise InvalidConversationError(
                    f"unknown role: expected system, user, assistant, tool, latest_reminder or "
                    f"developer, got {role!r}"
                )
        self._transition(out, index)

    def _system(self, out: list[str], index: int) -> None:
        message = self.turns[index]
        opened_by_effort = index == 0 and self.thinking
        if self.generation.has_system_token and not opened_by_effort:
            out.append(SYSTEM)
        out.append(self._text(message.get("content") or ""))
        self._declarations(out, message)

    def _developer(self, out: list[str], message: Dict) -> None:
        content = message.get("content")
        if not content:
            raise InvalidConversationError("a developer message must have content, got none")
        out += [USER, self._text(content)]
        self._declarations(out, message)

    def _declarations(self, out: list[str], message: Dict) -> None:
        if message.get("tools"):
            out.append("\n\n")
            self.renderer.tools_block(out, message["tools"])
        if message.get("response_format"):
            out += ["\n\n", _RESPONSE_FORMAT, json_text(message["response_format"])]

    def _text(self, content: Any) -> str:
        """Text of system, developer and assistant content; a list prints as V4's host language."""
        if isinstance(content, list) and self.generation.has_system_token:
            return "\n\n".join(part["text"] for part in _parts(content))
        return str(content)

    def _blocks(self, out: list[str], blocks: Sequence[Dict]) -> None:
        for i, block in enumerate(blocks):
            if i:
                out.append("\n\n")
            if block["type"] == "text":
                self._user_text(out, block["text"])
                continue
            out.append("<tool_result>")
            self._result_text(out, block["content"])
            out.append("</tool_result>")

    def _user_text(self, out: list[str], text: Any) -> None:
        if isinstance(text, list) and self.generation.has_system_token:
            self._join_parts(out, text)
        elif isinstance(text, tuple):  # items from the default face
            out += text
        elif isinstance(text, str):
            out.append(text)
        else:
            raise InvalidConversationError(
                f"content of a user message: expected a string, got {type(text).__name__}",
                hint="the default face (strict=False) accepts null and lists of text parts",
            )

    def _result_text(self, out: list[str], content: Any) -> None:
        if isinstance(content, list):
            self._join_parts(out, content)
        elif isinstance(content, tuple):
            out += content
        else:
            out.append(str(content))

    def _join_parts(self, out: list[str], content: list[Any]) -> None:
        for i, part in enumerate(_parts(content)):
            if i:
                out.append("\n\n")
            kind = part.get("type")
            if kind == "text":
                out.append(str(part.get("text", "")))
            elif kind == "image_url" and self.generation.has_system_token:
                out.append(IMAGE)
            else:
                out.append(f"[Unsupported {kind}]")

    def _assistant(self, out: list[str], index: int) -> None:
        message = self.turns[index]
        previous = self.turns[index - 1] if index else {}
        answers_task = previous.get("task") is not None
        keeps = self.thinking and (not self.drop or index > self.last_user)
        opened = bool(index) and self._takes_turns(index - 1)
        if not self.settings.strict and not answers_task and not opened:
            out += [ASSISTANT, THINK_START if keeps else THINK_END]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or ""
        unfinished = bool(message.get("wo_eos"))
        if keeps and not answers_task:
            out.append(str(reasoning))
            # The reference always closes the thinking; `prefix` continues it (default face).
            if not (unfinished and message.get("prefix") and reasoning and not content):
                out.append(THINK_END)
        out.append(self._text(content))
        calls = message.get("tool_calls")
        if calls:
            self.renderer.calls.write_block(out, [self._call(call) for call in calls])
        if not unfinished:
            out.append(EOS)

    def _call(self, call: Dict) -> tuple[str, list[Any]]:
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidConversationError("a tool call has no function with a name")
        required = self.generation.has_system_token and self.settings.strict
        return function["name"], parameters_of(function.get("arguments"), object_required=required)

    def _transition(self, out: list[str], index: int) -> None:
        """Hand over to the assistant after the last message, or where it speaks next."""
        message = self.turns[index]
        is_last = index == len(self.turns) - 1
        if not is_last and self.turns[index + 1].get("role") not in (
            "assistant",
            "latest_reminder",
        ):
            return
        if is_last and self.settings.generation_prompt is False:
            return
        task = message.get("task")
        if task is not None:
            self._task(out, task)
        elif self._takes_turns(index):
            opens = self.thinking and (not self.drop or index >= self.last_user)
            out += [ASSISTANT, THINK_START if opens else THINK_END]

    def _takes_turns(self, index: int) -> bool:
        role = self.turns[index].get("role")
        mid_system = role == "system" and index > 0 and self.generation.has_system_token
        return role in ("user", "developer") or mid_system

    def _task(self, out: list[str], task: Any) -> None:
        if not isinstance(task, str) or task not in TASKS:
            raise InvalidConversationError(
                f"unknown task: expected one of {', '.join(TASKS)}, got {task!r}"
            )
        if task == "action":
            out += [ASSISTANT, THINK_START if self.thinking else THINK_END, ACTION]
        else:
            out.append(TASKS[task])

    def handoff_at_end(self, out: list[str]) -> None:
        """Open the assistant's turn where the reference does not but the caller asked for it."""
        if self.settings.generation_prompt is not True or not self.turns:
            return
        last = len(self.turns) - 1
        message = self.turns[last]
        unfinished = message.get("task") is not None or message.get("wo_eos")
        if not unfinished and not self._takes_turns(last):
            out += [ASSISTANT, THINK_START if self.thinking else THINK_END]


def _parts(content: list[Any]) -> list[Dict]:
    for part in content:
        if not isinstance(part, dict):
            raise InvalidConversationError(
                f"content parts: expected objects with a type, got {type(part).__name__}"
            )
    return content
