"""What kernels and dtypes change: the error of each layer, and what a trained network would say otherwise.

    python benchmarks/kernel_accuracy.py [--tokens 1024] [--replies 10] [--json]

The reference is the modules in float32, without kernels. `layers`: A192 with random weights, stored as a published
checkpoint is (so that all forms have the same weights), with the reference's choices of experts and entries; the
relative rms error of the residual streams behind each layer. `nano`: the network of the package on facts that lie 400 tokens
back and its own replies, with choices of its own; mean KL of the next token in nats, and how often the most probable one is
the same, everywhere and in replies alone.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from hadal.bench.networks import write_network
from hadal.checkpoint import load
from hadal.encoding import Encoding
from hadal.model import Precision, Trace, Transformer, kernels
from hadal.model.block import Block
from hadal.nano import nano_checkpoint
from nano_recall import make_prompt, reply_ids

FORMS = {
    "kernels, float32": (torch.float32, True),
    "kernels, BF16": (torch.bfloat16, True),
    "modules, BF16": (torch.bfloat16, False),
}


@contextmanager
def streams_of() -> Iterator[list[Tensor]]:
    """Record what leaves each block. A hook of all modules: one of a block would leave the kernels out."""
    found: list[Tensor] = []

    def keep(module: nn.Module, _given: object, streams: Tensor) -> None:
        if isinstance(module, Block):
            found.append(streams.float())

    handle = nn.modules.module.register_module_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def run(model: Transformer, ids: Tensor, trace: Trace, *, kernel: bool) -> list[Tensor]:
    """Return the streams behind each block."""
    with nullcontext() if kernel else kernels.without_kernels(), streams_of() as found:
        model.streams(ids, [ids.shape[0]], trace=trace)
    return found


def layers(folder: Path, tokens: int) -> dict[str, list[float]]:
    """Return the error of each layer by form."""
    write_network("a192", folder, ["stored"])
    exact = Precision.exact()
    reference = load(folder / "stored", dtype=torch.float32, precision=exact)
    ids = torch.randint(3, 16_000, (tokens,), generator=torch.Generator().manual_seed(1))
    choices = Trace()
    expected = run(reference, ids, choices, kernel=False)
    errors: dict[str, list[float]] = {}
    for name, (dtype, kernel) in FORMS.items():
        model = load(folder / "stored", dtype=dtype, precision=exact)
        found = run(model, ids, choices.replay(), kernel=kernel)
        errors[name] = [
            ((a - b).square().mean() / b.square().mean()).sqrt().item()
            for a, b in zip(found, expected, strict=True)
        ]
    return errors


def texts(count: int) -> list[tuple[list[int], int]]:
    """Return prompts with nano's most probable replies, and how long each prompt is."""
    encoding = Encoding.load("v4", tokenizer=nano_checkpoint())
    prompts = [make_prompt(encoding, 400, seed)[0] for seed in range(count)]
    model = load(nano_checkpoint())
    return [(ids + reply_ids(model, encoding, ids), len(ids)) for ids in prompts]


def nano(count: int) -> dict[str, dict[str, float]]:
    """Return what a trained network says otherwise, by form."""
    samples = texts(count)
    reference = load(nano_checkpoint(), dtype=torch.float32)
    with kernels.without_kernels():
        expected = [reference(torch.tensor(ids), [len(ids)]) for ids, _ in samples]
    rows: dict[str, dict[str, float]] = {}
    for name, (dtype, kernel) in FORMS.items():
        model = load(nano_checkpoint(), dtype=dtype)
        with nullcontext() if kernel else kernels.without_kernels():
            found = [model(torch.tensor(ids), [len(ids)]) for ids, _ in samples]
        pairs = list(zip(found, expected, strict=True))
        kl = torch.cat([kl_of(a, b) for a, b in pairs])
        same = [a.argmax(-1) == b.argmax(-1) for a, b in pairs]
        replies = torch.cat([s[start - 1 :] for s, (_, start) in zip(same, samples, strict=True)])
        rows[name] = {
            "tokens": len(kl),
            "kl": kl.mean().item(),
            "same_argmax": torch.cat(same).float().mean().item(),
            "same_argmax_in_replies": replies.float().mean().item(),
        }
    return rows


def kl_of(found: Tensor, expected: Tensor) -> Tensor:
    """Return KL(expected || found) of each token."""
    a, b = (logits.double().log_softmax(-1) for logits in (found, expected))
    return kl_div(a, b, log_target=True, reduction="none").sum(-1)


@torch.inference_mode()
def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of the random network's prompt")
    parser.add_argument("--replies", type=int, default=10, help="of nano")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        by_layer = layers(Path(folder), options.tokens)
    trained = nano(options.replies)
    if options.json:
        print(json.dumps({"layers": by_layer, "nano": trained}))
        return
    print(f"A192, {options.tokens} tokens, replayed: relative rms error behind layers")
    for name, errors in by_layer.items():
        print(f"  {name:18}", *(f"{error:.1e}" for error in errors))
    print(
        "nano, free: KL of the next token, share of equal most probable ones, of those in replies"
    )
    for name, row in trained.items():
        print(
            f"  {name:18} {row['kl']:.1e} {row['same_argmax']:.2%} {row['same_argmax_in_replies']:.2%}"
            f" of {row['tokens']:.0f} tokens"
        )


if __name__ == "__main__":
    main()
