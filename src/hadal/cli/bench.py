"""`hadal bench`: measurements that can be repeated; nothing here passes or fails."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from hadal.cli.quantities import parse_token_list

if TYPE_CHECKING:
    from hadal.bench import Report

__all__ = ["app"]

app = App(name="bench", help="Measure, beside a peer in the same run; medians, spread, ratios.")

_Json = Annotated[bool, Parameter(name="--json", negative="")]
_Network = Literal["a192", "nano"]
_Clock = Literal["wall", "cpu"]
_Peer = Literal["transformers-fp32", "transformers-bf16"]
_PEERS: list[_Peer] = ["transformers-fp32", "transformers-bf16"]
_Lengths = Annotated[list[int], Parameter(converter=parse_token_list, consume_multiple=False)]


@app.command
def context(
    *,
    network: _Network = "nano",
    lengths: _Lengths = [2048, 8192, 32_768],  # noqa: B006 - never changed
    new: int = 16,
    rounds: int = 3,
    peer: list[_Peer] = _PEERS,
    peer_limit_s: float = 600.0,
    llama_cpp: Path | None = None,
    threads: int | None = None,
    clock: _Clock = "wall",
    json_output: _Json = False,
) -> None:
    """W1, W2, W3: prefill and decode at growing lengths, beside transformers and the machine's limits.

    Examples:
        hadal bench context --network a192 --lengths 2k,8k,32k

        hadal bench context --network a192 --lengths 128k --rounds 1 --empty-peer

        hadal bench context --network a192 --llama-cpp ENV/bin/python

    Args:
        network: Which random network.
        lengths: Tokens of the prompts; 2k is 2,048.
        new: Tokens to decode after each prompt.
        rounds: Repetitions, in turn with the peers.
        peer: Which to run beside; repeat for several.
        peer_limit_s: Seconds for one prompt; a peer that takes longer is stopped, and named.
        llama_cpp: Python of an environment with llama-cpp-python 0.3.36, to run llama.cpp beside.
        threads: Of every side.
        clock: wall, or cpu where other work shares the cores; cpu means something with one thread only.
        json_output: Print one JSON object.
    """
    from hadal.bench.context import measure

    _use_threads(threads)
    report = measure(
        network,
        lengths,
        new,
        rounds,
        peers=peer,
        peer_limit_s=peer_limit_s,
        llama_cpp=llama_cpp,
        clock=clock,
    )
    _print(report, json_output)


@app.command
def cpu(
    *,
    network: _Network = "a192",
    lengths: _Lengths = [2048, 8192, 32_768],  # noqa: B006 - never changed
    new: int = 16,
    rounds: int = 5,
    folder: Path | None = None,
    only_hadal: bool = False,
    peer_limit_s: float = 600.0,
    threads: int | None = None,
    json_output: _Json = False,
) -> None:
    """W1, W2, W3 in every form of ours, beside transformers and llama.cpp in environments that this makes.

    The first time it installs both, which takes a package index, a compiler and a quarter of an hour.

    Examples:
        hadal bench cpu

        hadal bench cpu --lengths 128k --rounds 1 --only-hadal

    Args:
        network: Which random network.
        lengths: Tokens of the prompts; 2k is 2,048.
        new: Tokens to decode after each prompt.
        rounds: Repetitions, in turn with the peers.
        folder: Where the environments are kept. Default: hadal/bench in $XDG_CACHE_HOME.
        only_hadal: Leave the peers out.
        peer_limit_s: Seconds for one prompt; a peer that takes longer is stopped, and named.
        threads: Of every side.
        json_output: Print one JSON object.
    """
    from hadal.bench import environments
    from hadal.bench.context import OURS, PEERS, measure
    from hadal.bench.machine_limits import Limits

    _use_threads(threads)
    kept = (
        folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hadal/bench"
    )
    limits = Limits.measured()
    slow = limits.bf16_gflops < limits.fp32_gflops / 2
    peers: list[_Peer] = ["transformers-fp32"] if slow else list(PEERS)
    report = measure(
        network,
        lengths,
        new,
        rounds,
        ours=OURS,
        peers=() if only_hadal else peers,
        peer_limit_s=peer_limit_s,
        transformers=None if only_hadal else environments.transformers(kept),
        llama_cpp=None if only_hadal else environments.llama_cpp(kept),
    )
    if slow and not only_hadal:
        report.notes.append(
            f"transformers in BF16 was left out: this processor multiplies in it at {limits.bf16_gflops:.1f} GFLOP/s, "
            f"in float32 at {limits.fp32_gflops:.0f}"
        )
    _print(report, json_output)


@app.command
def serving(
    *,
    network: _Network = "nano",
    requests: int = 32,
    longest: int = 8192,
    new: int = 64,
    rounds: int = 5,
    json_output: _Json = False,
) -> None:
    """W4: prompts of mixed length at once, beside transformers one by one.

    Examples:
        hadal bench serving --network a192 --rounds 1

    Args:
        network: Which random network.
        requests: Prompts.
        longest: Tokens of the longest; the shortest has 64.
        new: Tokens to generate for each.
        rounds: Repetitions, in turn with the peer.
        json_output: Print one JSON object.
    """
    from hadal.bench.serving import measure

    _print(measure(network, requests, longest, new, rounds), json_output)


@app.command
def prefix(
    *,
    network: _Network = "nano",
    shared: int = 8192,
    tails: int = 16,
    rounds: int = 5,
    llama_cpp: Path | None = None,
    threads: int | None = None,
    clock: _Clock = "wall",
    json_output: _Json = False,
) -> None:
    """W5: time to the first token of a known prompt: from memory, from disk, after a restart.

    Examples:
        hadal bench prefix --network nano --shared 8192 --tails 16

    Args:
        network: Which random network.
        shared: Tokens that the prompts have in common.
        tails: Different continuations.
        rounds: Repetitions of all states.
        llama_cpp: Python of an environment with llama-cpp-python 0.3.36, to run llama.cpp beside.
        threads: Of every side.
        clock: wall, or cpu where other work shares the cores; cpu means something with one thread only.
        json_output: Print one JSON object.
    """
    from hadal.bench.prefix import measure

    _use_threads(threads)
    _print(measure(network, shared, tails, rounds, llama_cpp=llama_cpp, clock=clock), json_output)


@app.command
def cache(*, network: _Network = "nano", tokens: int = 8192, json_output: _Json = False) -> None:
    """W7: bytes that a token and a request occupy, beside the formulas of `hadal cost`.

    Examples:
        hadal bench cache --network a192 --tokens 32768

    Args:
        network: Which random network.
        tokens: Length of the request.
        json_output: Print one JSON object.
    """
    from hadal.bench.cache_size import measure

    _print(measure(network, tokens), json_output)


@app.command
def speculation(
    *, steps: int = 300, new: int = 64, rounds: int = 5, json_output: _Json = False
) -> None:
    """W6: multi-token prediction on a small network trained for it: same tokens, time, acceptance.

    Examples:
        hadal bench speculation --rounds 5

    Args:
        steps: Of training, a fifth of a second each.
        new: Tokens to generate for each prompt.
        rounds: Repetitions, in turn.
        json_output: Print one JSON object.
    """
    from hadal.bench.speculation import measure

    _print(measure(steps, new, rounds), json_output)


@app.command
def sandbox(
    *,
    rounds: int = 20,
    live: list[int] = [200],  # noqa: B006 - never changed
    swe_rex: Path | None = None,
    json_output: _Json = False,
) -> None:
    """Boxes: create, execute, fork, call, come back; beside crun, runc, podman, bwrap where they are.

    Examples:
        hadal bench sandbox

        hadal bench sandbox --rounds 50 --live 200 --live 2000

    Args:
        rounds: Repetitions, in turn with the peers.
        live: Boxes that live while more are made; repeat for several.
        swe_rex: Python of an environment with swe-rex, to run its local runtime beside.
        json_output: Print one JSON object.
    """
    from hadal.bench.sandbox import measure

    _print(measure(rounds, live, swe_rex=swe_rex), json_output)


@app.command
def machines(
    *,
    rounds: int = 20,
    live: list[int] = [1, 10, 20],  # noqa: B006 - never changed
    json_output: _Json = False,
) -> None:
    """Virtual machines: boot, start from a template, execute, pause, fork, and what each weighs.

    Examples:
        hadal bench machines

        hadal bench machines --rounds 5 --live 1

    Args:
        rounds: Repetitions; of boots a fifth of that.
        live: Machines that live when their memory is counted; repeat for several.
        json_output: Print one JSON object.
    """
    from hadal.bench.machines import measure

    _print(measure(rounds, live), json_output)


def _use_threads(threads: int | None) -> None:
    """Set how many threads products take, here and in the sides that are started from here."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _print(report: "Report", as_json: bool) -> None:
    text = json.dumps(report.to_json()) if as_json else report.to_text()
    sys.stdout.write(text + "\n")
