"""`hadal bench`: measurements that can be repeated; nothing here passes or fails."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from hadal.bench import Report

__all__ = ["app"]

app = App(name="bench", help="Measure, beside a peer in the same run; medians, spread, ratios.")

_Json = Annotated[bool, Parameter(name="--json", negative="")]
_Network = Literal["a192", "nano"]


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
    json_output: _Json = False,
) -> None:
    """W5: time to the first token of a known prompt: from memory, from disk, after a restart.

    Args:
        network: Which random network.
        shared: Tokens that the prompts have in common.
        tails: Different continuations.
        rounds: Repetitions of all states.
        json_output: Print one JSON object.
    """
    from hadal.bench.prefix import measure

    _print(measure(network, shared, tails, rounds), json_output)


@app.command
def cache(*, network: _Network = "nano", tokens: int = 8192, json_output: _Json = False) -> None:
    """W7: bytes that a token and a request occupy, beside the formulas of `hadal cost`.

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

    Args:
        steps: Of training, a fifth of a second each.
        new: Tokens to generate for each prompt.
        rounds: Repetitions, in turn.
        json_output: Print one JSON object.
    """
    from hadal.bench.speculation import measure

    _print(measure(steps, new, rounds), json_output)


def _print(report: "Report", as_json: bool) -> None:
    text = json.dumps(report.to_json()) if as_json else report.to_text()
    sys.stdout.write(text + "\n")
