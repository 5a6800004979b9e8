"""A run so far, made of its events: the same whether they happen now or were read from the journal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hadal.agent.stop import Ending, StopReason
from hadal.chat import AssistantMessage, Message, ToolCall, ToolMessage, UserMessage

__all__ = ["Trajectory", "added", "last_score", "message_fields"]


@dataclass
class Trajectory:
    """What has happened.

    Attributes:
        start: Fields of the first event; None before it.
        messages: From the user's first on.
        ids: Every token of the last prompt and of the reply to it.
        said: Which of `ids` the model said.
        parts: How many of `ids` are for what (`hadal.agent.budget`), as far as the journal says.
        reply: Tokens of a reply that is not finished; None where none is under way.
        open_calls: Calls without a result, by id.
        turns: Replies that are finished.
        users: Messages of the user so far.
        bad_turns: Replies in a row that led to nothing.
        bad: Why the last reply led to nothing, and the problem, until the model has been told.
        lost: What of the last reply could not be read beside its calls, until the model has been told.
        ending: How it ended; None while it goes on.
    """

    start: dict[str, Any] | None = None
    messages: list[Message] = field(default_factory=list[Message])
    ids: list[int] = field(default_factory=list[int])
    said: list[bool] = field(default_factory=list[bool])
    parts: dict[str, int] = field(default_factory=dict[str, int])
    reply: list[int] | None = None
    open_calls: dict[str, ToolCall] = field(default_factory=dict[str, ToolCall])
    turns: int = 0
    users: int = 0
    bad_turns: int = 0
    bad: tuple[StopReason, str] | None = None
    lost: str = ""
    ending: Ending | None = None
    history: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    """Of every finished call: name, arguments and result."""
    results: dict[str, ToolMessage] = field(default_factory=dict[str, ToolMessage])
    """Of the calls of the last reply, until all are there."""
    calls: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, events: Sequence[dict[str, Any]]) -> "Trajectory":
        """Return what events come to."""
        trajectory = cls()
        for event in events:
            trajectory.apply(event)
        return trajectory

    def apply(self, event: dict[str, Any]) -> None:
        """Take an event in."""
        match event["kind"]:
            case "start":
                self.start = event
            case "user":
                self.messages.append(UserMessage(event["text"]))
                self.users += event.get("by", "user") == "user"
                self.bad, self.lost = None, ""
            case "prompt":
                if event["anew"]:
                    self.ids, self.said, self.parts = [], [], {}
                self.parts = added(self.parts, event)
                self._extend(event["ids"], said=False)
                self.reply = []
            case "tokens":
                assert self.reply is not None
                self.reply += event["ids"]
            case "reply":
                self._finish_reply(event)
            case "result":
                self._finish_call(event)
            case "end":
                self.ending = Ending(StopReason(event["reason"]), event["text"])
            case "again":
                self.ending = None
            case _:
                pass  # of a newer version; nothing here depends on it

    def _extend(self, ids: list[int], *, said: bool) -> None:
        self.ids += ids
        self.said += [said] * len(ids)

    def _finish_reply(self, event: dict[str, Any]) -> None:
        self._extend(self.reply or [], said=True)
        self.parts = added(self.parts, event)
        self.reply = None
        self.turns += 1
        self.bad_turns = self.bad_turns + 1 if event["bad"] else 0
        self.bad = (StopReason(event["bad"]), event["problem"]) if event["bad"] else None
        message = _read_message(event["message"])
        self.lost = event["problem"] if message.tool_calls else ""
        self.messages.append(message)
        self.open_calls = {call.id: call for call in message.tool_calls if call.id is not None}
        self.calls, self.results = list(self.open_calls), {}

    def _finish_call(self, event: dict[str, Any]) -> None:
        call = self.open_calls.pop(event["call"])
        self.history.append((call.name, call.arguments, event["text"]))
        self.results[event["call"]] = ToolMessage(event["text"], event["call"])
        if not self.open_calls:
            self.messages += [self.results[call_id] for call_id in self.calls]

    @property
    def answer(self) -> str:
        """Return what the model said last."""
        last = next((m for m in reversed(self.messages) if isinstance(m, AssistantMessage)), None)
        return last.content if last is not None and isinstance(last.content, str) else ""

    def same_calls(self) -> int:
        """Return how often the last call was made in a row, with the same result."""
        count = 0
        for call in reversed(self.history):
            if call != self.history[-1]:
                break
            count += 1
        return count


def added(parts: dict[str, int], event: dict[str, Any]) -> dict[str, int]:
    """Return tokens by part with those that an event says, if it is not older than that."""
    return parts | {p: parts.get(p, 0) + n for p, n in event.get("parts", {}).items()}


def last_score(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the event that scores a run; None where there is none, or where a void run was gone on with."""
    last = next((e for e in reversed(events) if e["kind"] != "box_ended"), None)
    return last if last is not None and last["kind"] == "score" else None


def message_fields(message: AssistantMessage) -> dict[str, Any]:
    """Return a reply as JSON."""
    return {
        "content": message.content,
        "reasoning": message.reasoning_content,
        "calls": [[call.id, call.name, call.arguments] for call in message.tool_calls],
    }


def _read_message(fields: dict[str, Any]) -> AssistantMessage:
    calls = tuple(
        ToolCall(name, arguments, id=call_id) for call_id, name, arguments in fields["calls"]
    )
    return AssistantMessage(
        fields["content"], reasoning_content=fields["reasoning"], tool_calls=calls
    )
