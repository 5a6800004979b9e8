"""W1, W2, W3: a prompt and decoding after it, alone, at growing lengths, beside peers and the machine.

Every side runs in a process of its own; in every round each has its turn, and the machine's limits
are measured again. Ratios are taken round by round.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from hadal.bench import llama_cpp_peer
from hadal.bench.machine_limits import Limits, LimitsOfRounds
from hadal.bench.networks import NETWORKS, NetworkName
from hadal.bench.report import ClockName, Report, Spread
from hadal.bench.side import SideProcess
from hadal.bench.work import decode_bytes, prefill_flops
from hadal.config import ModelConfig
from hadal.errors import EngineError, InputError

__all__ = ["PEERS", "PeerName", "Samples", "StoppedError", "measure", "run_prompt"]

PeerName = Literal["transformers-fp32", "transformers-bf16"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)

_OURS = "hadal-fp32"
_LLAMA_CPP = "llama.cpp"
_ABOUT_LLAMA_CPP = (
    "llama.cpp multiplies 4-bit experts with 8-bit activations and keeps keys in float16: a comparison "
    "of speed, not of the same arithmetic; its limit of a prompt is taken as that of float32"
)
_GOALS = (
    "goals, W1: float32 at 0.75 of its limit up to 32k, and 32k at 0.85 of the speed at 2k; "
    "W2: 7 ms a token at any length; W3: 128k in less than 2,000 MB over the weights, 1,300 "
    "tokens/s, 10 ms a token",
    "the limit of a prompt is its fewest FLOPs at the rate of a large product in the same format; "
    "that of a token is the active weights and what it looks at of the cache, once, at the speed of "
    "a copy",
    "memory is the growth of the process over weights, libraries and a warm-up of 256 tokens",
)


@dataclass
class Samples:
    """What one side did at one length, round by round."""

    prefill_s: list[float] = field(default_factory=list[float])
    decode_ms: list[float] = field(default_factory=list[float])
    peak_mb: list[float] = field(default_factory=list[float])
    tokens: list[list[int]] = field(default_factory=list[list[int]])


@dataclass(frozen=True)
class _Format:
    """In which numbers a side computes and what it reads."""

    bits: int
    expert_bits: float | None = None


_FORMATS: Mapping[str, _Format] = {
    _OURS: _Format(32),
    "transformers-fp32": _Format(32),
    "transformers-bf16": _Format(16),
    _LLAMA_CPP: _Format(32, expert_bits=4.25),
}


class StoppedError(Exception):
    """A side would take too long."""


def measure(
    name: NetworkName,
    lengths: Sequence[int],
    new: int,
    rounds: int,
    *,
    peers: Sequence[PeerName] = PEERS,
    peer_limit_s: float = 600.0,
    llama_cpp: Path | None = None,
    clock: ClockName = "wall",
) -> Report:
    """Compute a prompt of each length and decode after it, in turn with the peers.

    Args:
        name: Which random network.
        lengths: Tokens of the prompts.
        new: Tokens to decode after each.
        rounds: Repetitions, in turn.
        peers: Which to run.
        peer_limit_s: Seconds of a prompt beyond which a peer is stopped.
        llama_cpp: Python of an environment with llama-cpp-python, to run it too.
        clock: Of all figures; the limit of a peer is always in wall time.

    Raises:
        InputError: No length, or fewer than two tokens to decode.
        EngineError: Our own side ended; a peer that does is named in a note.
    """
    if not lengths or min(lengths) < 1 or new < 2:
        raise InputError("context: expected at least one length, and two tokens to decode")
    config = NETWORKS[name]
    shown = ", ".join(f"{length:,}" for length in sorted(lengths))
    report = Report(
        f"W1-W3 context: {name}, prompts of {shown} tokens, {new} decoded, batch 1, {clock} time"
    )
    measured = LimitsOfRounds()
    found: dict[int, dict[str, Samples]] = {}
    with ExitStack() as stack:
        sides = {_OURS: _start(stack, "hadal", name)}
        sides |= {peer: _start(stack, peer, name) for peer in peers}
        if llama_cpp is not None:
            sides[_LLAMA_CPP] = llama_cpp_peer.start(stack, llama_cpp, name)
            for figure, value in llama_cpp_peer.agreement(sides[_LLAMA_CPP], name).items():
                report.figures[f"llama.cpp beside hadal, experts alike: {figure}"] = value
        for side in sides.values():
            side.wait_ready()
        for length in sorted(lengths):
            found[length] = {}
            for number in range(rounds):
                measured.add(Limits.measured(clock))
                ids = _prompt(config, length, number)
                _round(sides, ids, new, peer_limit_s, clock, found[length], report)
    for limit, spread in measured.spreads().items():
        report.figures[f"limit: {limit}"] = spread
    for length, samples in found.items():
        _describe(report, config, length, samples, measured.median)
    report.notes += _GOALS
    report.notes.append(llama_cpp_peer.HOW_TO_GET_IT if llama_cpp is None else _ABOUT_LLAMA_CPP)
    return report


def _start(stack: ExitStack, kind: str, name: NetworkName) -> SideProcess:
    command = [sys.executable, "-m", "hadal.bench.context_sides", kind, name]
    return stack.enter_context(SideProcess([*command, str(torch.get_num_threads())]))


def _prompt(config: ModelConfig, length: int, number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(2, config.vocab_size) for _ in range(length)]


def _round(
    sides: dict[str, SideProcess],
    ids: list[int],
    new: int,
    limit_s: float,
    clock: ClockName,
    found: dict[str, Samples],
    report: Report,
) -> None:
    """Give every side its turn; a peer that fails or is too slow takes no more part."""
    for name in list(sides):
        samples = found.setdefault(name, Samples())
        try:
            run_prompt(sides[name], ids, new, None if name == _OURS else limit_s, samples, clock)
        except (StoppedError, EngineError) as err:
            if name == _OURS:
                raise
            if not samples.prefill_s:
                del found[name]
            report.notes.append(f"{name} at {len(ids):,} tokens and beyond: {err}")
            sides.pop(name).close()


def run_prompt(
    side: SideProcess,
    ids: list[int],
    new: int,
    limit_s: float | None,
    samples: Samples,
    clock: ClockName = "wall",
) -> None:
    """Compute one prompt and decode after it.

    Raises:
        StoppedError: It would take longer than the limit, as far as could be seen.
        EngineError: The process ended.
    """
    side.ask({"start": ids, "new": new})
    seconds, spent, step = 0.0, 0.0, dict[str, Any](done=0, token=None)
    while step["token"] is None:
        before = step["done"]
        step = side.ask({"step": None})
        seconds += step["wall"]
        spent += step[clock]
        # Chunks only get slower, so the rest takes at least as long as the last one did.
        least = seconds + step["wall"] * (len(ids) - step["done"]) / (step["done"] - before)
        if limit_s is not None and least > limit_s:
            raise StoppedError(
                f"stopped after {step['done']:,} of them in {seconds:.0f} s: all would take at "
                f"least {least:.0f} s, more than the limit of {limit_s:.0f}"
            )
    tokens, decode = [step["token"]], list[float]()
    while len(tokens) < new:
        step = side.ask({"step": None})
        decode.append(1e3 * step[clock])
        tokens.append(step["token"])
    samples.prefill_s.append(spent)
    samples.decode_ms.append(Spread.of(decode).median)
    samples.peak_mb.append(step["peak"] / 1e6)
    samples.tokens.append(tokens)


def _describe(
    report: Report,
    config: ModelConfig,
    length: int,
    found: dict[str, Samples],
    limits: Limits,
) -> None:
    """Add the figures of one length."""
    flops, ours = prefill_flops(config, length), found[_OURS]
    for name, samples in found.items():
        form, at = _FORMATS[name], f"{length:,}: {name}"
        gflops = limits.bf16_gflops if form.bits == 16 else limits.fp32_gflops
        read = decode_bytes(config, length, bits=form.bits, expert_bits=form.expert_bits)
        speed = Spread.of([length / s for s in samples.prefill_s])
        decode = Spread.of(samples.decode_ms)
        report.figures |= {
            f"{at}: prefill, tokens/s": speed,
            f"{at}: prefill, share of limit": flops / length * speed.median / gflops / 1e9,
            f"{at}: decode, ms a token": decode,
            f"{at}: decode, share of limit": read / limits.copy_gbps / 1e6 / decode.median,
            f"{at}: memory over the weights, MB": max(samples.peak_mb),
        }
        if name != _OURS:
            report.figures |= {
                f"{length:,}: hadal over {name}: prefill speed": _ratios(
                    samples.prefill_s, ours.prefill_s
                ),
                f"{length:,}: hadal over {name}: decode time": _ratios(
                    ours.decode_ms, samples.decode_ms
                ),
            }
        if name.startswith("transformers"):
            report.figures[f"{at}: greedy tokens equal to hadal's"] = _agreement(
                ours.tokens, samples.tokens
            )


def _ratios(above: list[float], below: list[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(above, below, strict=False)])


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Return how many tokens are equal before the first that differs, all rounds together.

    What comes after a token that differs continues another text and says nothing.
    """
    same = 0
    for a, b in zip(ours, theirs, strict=False):
        differs = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        same += next(differs, len(a))
    return f"{same} of {sum(map(len, theirs))}"
