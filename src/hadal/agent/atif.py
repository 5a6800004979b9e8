"""A run as ATIF v1.8, the trajectory format of Harbor: for its viewer and for trainers (ecosystem 1.2).

Prompt ids are those that the model saw in that turn, all of them; completion ids are those that it said, which is the
mask of a loss: nothing else was said by it. Where the harness spoke for the user, the step says so.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from hadal import __version__
from hadal.agent.stop import Ending, Outcome, StopReason
from hadal.agent.trajectory import added, last_score

__all__ = ["ATIF_VERSION", "to_atif"]

ATIF_VERSION: Final = "ATIF-v1.8"


def to_atif(
    events: Sequence[dict[str, Any]], session_id: str, *, model_name: str | None = None,
    token_ids: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Return a run as one JSON object.

    Args:
        events: Of its journal; it may still go on.
        session_id: What it is called.
        model_name: Of the model. Default: as the run was begun with.
        token_ids: Put in the ids of every prompt, which grow with the square of the turns.
    """
    writer = _Writer(token_ids=token_ids)
    for event in events:
        writer.take(event)
    score = last_score(events)
    if score is not None:
        writer.extra |= {"score": score["score"], "score_detail": score["detail"]}
        if score["score"] is None:
            writer.extra["outcome"] = Outcome.VOID
    start = writer.start or {"system": "", "tools": []}
    tools = [{"type": "function", "function": function} for function in start["tools"]]
    agent = {"name": "hadal", "version": __version__, "tool_definitions": tools}
    model_name = model_name or writer.model_name
    if model_name is not None:
        agent["model_name"] = model_name
    return {
        "schema_version": ATIF_VERSION,
        "session_id": session_id,
        "agent": agent,
        "steps": writer.steps,
        "final_metrics": writer.totals(),
        "extra": writer.extra,
    }


class _Writer:
    """Turns events into steps, one after the other."""

    def __init__(self, *, token_ids: bool) -> None:
        self.steps: list[dict[str, Any]] = []
        self.start: dict[str, Any] | None = None
        self.extra: dict[str, Any] = {}
        self.model_name: str | None = None
        self._token_ids = token_ids
        self._ids: list[int] = []
        self._reply: list[int] = []
        self._logprobs: list[float] = []
        self._parts: dict[str, int] = {}
        self._counts = [0, 0]  # of both: where ids are not asked for, none are kept
        self._open: dict[str, dict[str, Any]] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Take an event in."""
        match event["kind"]:
            case "task":
                self.model_name = event.get("settings", {}).get("model")
            case "start":
                self.start = event
                self._step(event, "system", event["system"])
                if "window" in event:
                    self.extra["window"] = event["window"]
            case "user":
                step = self._step(event, "user", event["text"])
                if event.get("by", "user") != "user":
                    step["extra"] = {"by": event["by"]}
            case "prompt":
                self._take_prompt(event)
            case "tokens":
                self._counts[1] += len(event["ids"])
                said = self.extra.setdefault("pending", {"text": ""})
                said["tokens"] = self._counts[1]
                said["text"] += event.get("text", "")
                if self._token_ids:
                    self._reply += event["ids"]
                    self._logprobs += event.get("logprobs", [])
            case "reply":
                self._take_reply(event)
            case "call":  # again after a crash: then its output comes from the start
                self.extra.setdefault("running", {})[event["call"]] = ""
            case "output":
                self.extra["running"][event["call"]] += event["text"]
            case "result":
                self._take_result(event)
            case "box":
                self.extra["box"] = event["id"]
            case "end":
                ending = Ending(StopReason(event["reason"]), event["text"])
                self.extra |= {
                    "stop_reason": ending.reason, "stop_text": ending.text, "outcome": ending.outcome,
                }  # fmt: skip
            case "again":
                for key in ("stop_reason", "stop_text", "outcome"):
                    self.extra.pop(key, None)
            case _:
                pass

    def _step(self, event: dict[str, Any], source: str, message: str) -> dict[str, Any]:
        at = datetime.fromtimestamp(event["at"] / 1e9, UTC).isoformat().replace("+00:00", "Z")
        step = {
            "step_id": len(self.steps) + 1,
            "timestamp": at,
            "source": source,
            "message": message,
        }
        self.steps.append(step)
        return step

    def _take_prompt(self, event: dict[str, Any]) -> None:
        known = 0 if event["anew"] else self._counts[0]
        self._parts = added({} if event["anew"] else self._parts, event)
        self._counts = [known + len(event["ids"]), 0]
        if self._token_ids:
            self._ids = list(event["ids"]) if event["anew"] else self._ids + event["ids"]
            self._reply, self._logprobs = [], []

    def _take_reply(self, event: dict[str, Any]) -> None:
        said = event["message"]
        step = self._step(event, "agent", said["content"])
        if said["reasoning"]:
            step["reasoning_content"] = said["reasoning"]
        if self.start is not None and self.start.get("effort") is not None:
            step["reasoning_effort"] = self.start["effort"]
        if said["calls"]:
            step["tool_calls"] = [
                {"tool_call_id": call, "function_name": name, "arguments": _arguments(arguments)}
                for call, name, arguments in said["calls"]
            ]
            step["observation"] = {"results": []}
            self._open = dict.fromkeys((call for call, _, _ in said["calls"]), step)
        metrics: dict[str, Any] = {
            "prompt_tokens": self._counts[0], "completion_tokens": self._counts[1],
        }  # fmt: skip
        if self._token_ids:
            metrics |= {"prompt_token_ids": self._ids, "completion_token_ids": self._reply}
            if self._logprobs and len(self._logprobs) == len(self._reply):
                metrics["logprobs"] = self._logprobs
        if event["cached_tokens"] is not None:
            metrics["cached_tokens"] = event["cached_tokens"]
        self._parts = added(self._parts, event)
        if self._parts:
            metrics["extra"] = {"context": self._parts}
        step |= {"metrics": metrics, "llm_call_count": 1}
        step["extra"] = {k: event[k] for k in ("termination", "problems", "seconds", "bad")}
        self.extra.pop("pending", None)
        self._counts = [sum(self._counts), 0]
        if self._token_ids:
            self._ids = [*self._ids, *self._reply]

    def _take_result(self, event: dict[str, Any]) -> None:
        running = self.extra.get("running", {})
        running.pop(event["call"], None)
        if not running:
            self.extra.pop("running", None)
        step = self._open[event["call"]]
        fields = ("failed", "exit_code", "step", "full_text", "seconds", "files")
        step["observation"]["results"].append(
            {
                "source_call_id": event["call"],
                "content": event["text"],
                "extra": {key: event[key] for key in fields if event.get(key) is not None},
            }
        )

    def totals(self) -> dict[str, Any]:
        """Return the sums over all steps."""
        metrics = [step["metrics"] for step in self.steps if "metrics" in step]
        return {
            "total_prompt_tokens": sum(m["prompt_tokens"] for m in metrics),
            "total_completion_tokens": sum(m["completion_tokens"] for m in metrics),
            "total_cached_tokens": sum(m.get("cached_tokens", 0) for m in metrics),
            "total_steps": len(self.steps),
        }


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call; as their text, where it is no object, or JSON or UTF-8 have no place for it.

    A model may write an infinite number (1e999), half a surrogate pair, or a number of 5,000 digits.
    """
    try:
        arguments = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {"text": text}
    return arguments if isinstance(arguments, dict) else {"text": text}
