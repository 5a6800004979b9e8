"""W4: ragged serving, beside transformers one request at a time, which is its only correct way."""

import math
import random

from hadal.bench.networks import NetworkName, network
from hadal.bench.report import Report, interleave
from hadal.bench.transformers_peer import generate, load_peer
from hadal.engine import LLM, SamplingParams

__all__ = ["measure"]


def measure(name: NetworkName, requests: int, longest: int, new: int, rounds: int) -> Report:
    """Serve prompts of log-uniform length, 16 at a time; compare tokens and time."""
    report = Report(
        f"W4 ragged serving: {name}, {requests} prompts of 64 to {longest} tokens, {new} new each"
    )
    rng = random.Random(0)
    model = network(name)
    lengths = [
        round(math.exp(rng.uniform(math.log(64), math.log(longest)))) for _ in range(requests)
    ]
    prompts = [[rng.randrange(2, model.config.vocab_size) for _ in range(n)] for n in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    answers: dict[str, list[list[int]]] = {}

    def ours() -> None:
        llm = LLM(model, max_num_seqs=16, max_model_len=longest + new, prefix_caching=False)
        answers["hadal"] = [list(c.token_ids) for c in llm.generate(prompts, params)]

    def alone() -> None:
        llm = LLM(model, max_num_seqs=1, max_model_len=longest + new, prefix_caching=False)
        done = [llm.generate([p], params)[0] for p in prompts]
        answers["one at a time"] = [list(c.token_ids) for c in done]

    peer = load_peer(model)

    def theirs() -> None:
        answers["transformers"] = [generate(peer, prompt, new) for prompt in prompts]

    spreads = interleave(
        {"hadal": ours, "one at a time": alone, "transformers": theirs}, rounds, warm_up=False
    )
    tokens = sum(lengths) + requests * new
    for runner, spread in spreads.items():
        report.figures[f"{runner}: seconds"] = spread
        report.figures[f"{runner}: tokens a second, prompts included"] = tokens / spread.median
    peer_seconds = spreads["transformers"].median
    report.figures["transformers over hadal"] = peer_seconds / spreads["hadal"].median
    for runner in ("one at a time", "transformers"):
        equal = sum(a == b for a, b in zip(answers["hadal"], answers[runner], strict=True))
        report.figures[f"answers equal to {runner}"] = f"{equal} of {requests}"
    report.notes.append("goal: six times the peer; float32 on both sides, the same weights")
    return report
