"""Facts that lie far back: how often nano finds them, with its compressed entries and without.

    python benchmarks/nano_recall.py --count 20 --distances 100 200 2000 16000

A user tells a number, then a text of some length, then asks for the number; the reply must call the shell with it.
Without entries the same network sees its window of 128 tokens and nothing else: the compressors and the
indexer are taken out of every layer. Prints one JSON object a distance.
"""

import argparse
import json
import re
import time

import torch

from hadal.agent import SYSTEM_PROMPT
from hadal.chat import AssistantMessage, Message, SystemMessage, UserMessage
from hadal.checkpoint import load
from hadal.encoding import Encoding
from hadal.encoding.tokens import EOS
from hadal.evals import interval
from hadal.model import Transformer
from hadal.model.attention import Attention
from hadal.nano import nano_checkpoint
from hadal.tasks import TOOLS
from hadal.tasks.draw import Draw
from hadal.tasks.families.carrying import recall_fact

REPLY = 64
"""Tokens of a reply, at most; the call takes about 45."""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="facts of each distance")
    parser.add_argument("--distances", type=int, nargs="+", default=[100, 200, 2000, 16000])
    parser.add_argument("--checkpoint", default=None, help="another checkpoint than nano")
    options = parser.parse_args()
    folder = options.checkpoint or nano_checkpoint()
    encoding = Encoding.load("v4", tokenizer=folder)
    models = {"entries": load(folder), "window alone": without_entries(load(folder))}
    for distance in options.distances:
        prompts = [make_prompt(encoding, distance, seed) for seed in range(options.count)]
        row: dict[str, object] = {"tokens_back": sum(b for _, b, _ in prompts) // len(prompts)}
        for name, model in models.items():
            began = time.monotonic()
            found = sum(
                calls_with(encoding.decode(reply_ids(model, encoding, ids)), encoding, value)
                for ids, _, value in prompts
            )
            row[name] = {
                "found": found, "of": len(prompts), "interval": interval(found, len(prompts)),
                "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
        print(json.dumps(row), flush=True)


def make_prompt(encoding: Encoding, distance: int, seed: int) -> tuple[list[int], int, str]:
    """Return the ids of a prompt, how many of them lie between the number and its end, and the number."""
    words = distance // 4
    while True:  # words have three to four tokens
        task = recall_fact(Draw("recall_fact", "test", 60_000 + seed), max(2, words))
        messages: list[Message] = [SystemMessage(SYSTEM_PROMPT, tools=TOOLS)]
        told, filler, asked = task.messages
        messages += [
            UserMessage(told), AssistantMessage("I keep it in mind.", reasoning_content="I keep it in mind."),
            UserMessage(filler), AssistantMessage("Noted.", reasoning_content="There is nothing to do."),
            UserMessage(asked),
        ]  # fmt: skip
        ids = encoding.encode(messages, mode="thinking", drop_thinking=False)
        start = encoding.encode(messages[:2], mode="thinking", drop_thinking=False)
        back = len(ids) - len(start)
        if words <= 2 or abs(back - distance) <= max(20, distance // 50):
            value = next(v for v in task.after.values() if v)
            return ids, back, value
        words = max(2, round(words * distance / back))


def without_entries(model: Transformer) -> Transformer:
    """Leave every layer its window alone; all else stays as it was trained."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.compressor = module.indexer = None
    return model


def calls_with(text: str, encoding: Encoding, value: str) -> bool:
    """Return whether a reply calls the shell with a number."""
    message = encoding.parse(text, mode="thinking", tools=TOOLS)
    return any(value in re.findall("[0-9]+", call.arguments) for call in message.tool_calls)


@torch.inference_mode()
def reply_ids(model: Transformer, encoding: Encoding, ids: list[int]) -> list[int]:
    """Return the most probable reply, without what ends it."""
    cache = model.new_cache()
    end = encoding.tokenizer.control_id(EOS)
    logits = model(torch.tensor(ids), [len(ids)], [cache])
    said: list[int] = []
    while len(said) < REPLY:
        token = int(logits[-1].argmax())
        if token == end:
            break
        said.append(token)
        logits = model(torch.tensor([token]), [1], [cache])
    return said


if __name__ == "__main__":
    main()
