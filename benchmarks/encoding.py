"""Time the message format beside DeepSeek's own library: render, tokenise, parse.

Both run in the same process, interleaved, on the same conversation and completion; medians and
spread of the rounds are printed as one JSON object per line. The physical limits beside them: the
tokenizer alone on the same runs of text (both sides use the `tokenizers` library), and an empty
Python method called once per chunk.

    python benchmarks/encoding.py [--rounds 7] [--tokens 1000000]
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepseek_recipe as recipe
from tests.golden.data import tokenizer, tokenizer_file

from hadal.encoding import Encoding

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))
TOKENS_PER_STEP = 2_300


def agent_conversation(tokens: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """An agent that reads and edits this package until the context is full; seeded."""
    rng = random.Random(0)
    lines = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]

    def some(count: int) -> str:
        at = rng.randrange(len(lines) - count)
        return "\n".join(lines[at : at + count])

    schema = {
        "type": "object",
        "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
    }
    tools = [
        {"type": "function", "function": {"name": n, "description": n, "parameters": schema}}
        for n in ("read", "edit")
    ]  # fmt: skip
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "Improve this package."},
    ]
    for i in range(tokens // TOKENS_PER_STEP):
        arguments = json.dumps({"path": f"src/{i}.py", "text": some(20)})
        call = {
            "id": str(i),
            "type": "function",
            "function": {"name": "edit", "arguments": arguments},
        }
        said = {
            "role": "assistant",
            "content": "",
            "reasoning_content": some(30),
            "tool_calls": [call],
        }
        messages += [said, {"role": "tool", "tool_call_id": str(i), "content": some(150)}]
    return messages, tools


def their_conversation(messages: list[dict], tools: list[dict]) -> recipe.Conversation:
    """The same conversation as an object of their library."""
    out: list[recipe.Message] = []
    for m in messages:
        if m["role"] == "system":
            out.append(recipe.SystemMessage(m["content"]))
        elif m["role"] == "user":
            out.append(recipe.UserMessage(m["content"]))
        elif m["role"] == "tool":
            out.append(recipe.ToolMessage(m["content"], m["tool_call_id"]))
        else:
            calls = [
                recipe.ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"])
                for c in m["tool_calls"]
            ]
            out.append(recipe.AssistantMessage(m["content"], m["reasoning_content"], calls))
    declared = [
        recipe.ToolDefinition(f["name"], f["description"], f["parameters"])
        for f in (t["function"] for t in tools)
    ]
    return recipe.Conversation(out, tools=declared, reasoning_effort="low")


def completion(tokens: int) -> str:
    """Reasoning, then calls with long string arguments, as an agent writes them."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in SOURCES).replace("｜", "|")
    text = text.replace("think>", "thing>")
    while len(text) < 4 * tokens:
        text += text
    half = 2 * tokens
    calls = [
        {"function": {"name": "edit", "arguments": json.dumps({"text": text[at : at + 8000]})}}
        for at in range(half, 2 * half, 8000)
    ]
    turn = {"role": "assistant", "reasoning_content": text[:half], "tool_calls": calls}
    rendered = Encoding.load("v4").render([{"role": "user", "content": "q"}, turn])
    return rendered.split("<｜Assistant｜><think>", 1)[1].removesuffix("<｜end▁of▁sentence｜>")


def parse_ours(chunks: list[str]) -> None:
    """Feed ours; ids of calls as cheap as theirs."""
    parser = Encoding.load("v4").stream(new_id=lambda: "call_0")
    for chunk in chunks:
        parser.feed(chunk)
    parser.finish("stop")


def parse_theirs(chunks: list[str]) -> None:
    """Feed theirs, which also makes the events of an HTTP response."""
    processor = recipe.StreamProcessor(
        recipe.MessagesChunkGenerator("id", "model", True),
        recipe.ParsingOptions(thinking_initial_stage=recipe.ThinkingInitialStage.ReasoningStart),
    )
    processor.push(recipe.InferenceChunk.ready())
    for chunk in chunks:
        processor.push(recipe.InferenceChunk.text(chunk, 1))
    processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    processor.finish()


class Nothing:
    """What a call per chunk costs by itself."""

    def feed(self, chunk: str) -> list[str]:
        """Hand the chunk back."""
        return [chunk]


def call_per_chunk(chunks: list[str]) -> None:
    """The floor for any parser with a Python method per chunk."""
    nothing = Nothing()
    for chunk in chunks:
        nothing.feed(chunk)


def interleaved(rounds: int, **runs: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each run, one of each per round, in rotating order; one warm-up round first."""
    names, seconds = list(runs), {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            runs[name]()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(what: str, seconds: dict[str, list[float]], **facts: object) -> None:
    """One line: medians and spread in seconds, and each median relative to theirs."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    line = {
        "what": what,
        **facts,
        "median_s": {n: round(m, 4) for n, m in medians.items()},
        "min_max_s": {n: [round(min(s), 4), round(max(s), 4)] for n, s in seconds.items()},
        "relative_to_theirs": {n: round(m / medians["theirs"], 3) for n, m in medians.items()},
    }
    print(json.dumps(line))


def main() -> None:
    """Run all three."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--tokens", type=int, default=1_000_000)
    given = options.parse_args()

    messages, tools = agent_conversation(given.tokens)
    ours = Encoding.load("v4", tokenizer=tokenizer())
    theirs = recipe.DeepseekV4Encoding().with_tokenizer(
        recipe.Tokenizer.from_file(str(tokenizer_file()))
    )
    ids = ours.encode(messages, tools=tools)
    if ids != theirs.encode(their_conversation(messages, tools)):
        raise SystemExit("the two sides do not do the same work: their ids differ")
    items = ours.prompt(messages, tools=tools).items
    facts = {"tokens": len(ids), "threads": len(os.sched_getaffinity(0))}
    seconds = interleaved(
        given.rounds,
        ours=lambda: ours.encode(messages, tools=tools),
        theirs=lambda: theirs.encode(their_conversation(messages, tools)),
        tokenizer_alone=lambda: tokenizer().encode_items(items),
    )
    report("render and tokenise, from messages to ids", seconds, **facts)

    text = completion(100_000)
    for size in (3, 64, len(text)):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        seconds = interleaved(
            given.rounds,
            ours=lambda c=chunks: parse_ours(c),
            theirs=lambda c=chunks: parse_theirs(c),
            call_per_chunk=lambda c=chunks: call_per_chunk(c),
        )
        megabytes = len(text.encode()) / 1e6
        rate = {n: round(megabytes / statistics.median(s), 1) for n, s in seconds.items()}
        report(
            "parse", seconds, chunk_characters=size, megabytes=round(megabytes, 2), mb_per_s=rate
        )


if __name__ == "__main__":
    main()
