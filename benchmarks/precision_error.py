"""The error that each simulated rounding causes, alone and all together.

    python benchmarks/precision_error.py [--tokens N] [--json]

Random weights of nano's shape, float32 otherwise. `free` lets the rounded model make its own
choices of experts and entries; `replayed` forces those of the exact one, so that what remains is
arithmetic. Random weights have small margins: the free column says how often choices flip there,
not what a trained model loses.
"""

import argparse
import dataclasses
import json

import torch

from hadal.model import ModelConfig, Precision, Trace, Transformer, randomize

CASES = {
    **{
        field.name: Precision(**{field.name: True})
        for field in dataclasses.fields(Precision)
        if field.default is False
    },
    "published()": Precision.published(),
    "published() + FP4/FP8 weights": dataclasses.replace(
        Precision.published(), expert_weights_fp4=True, linear_weights_fp8=True
    ),
}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the error over that of the expected values."""
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@torch.no_grad()
def measure(tokens: int) -> list[dict[str, object]]:
    """Return one row per switch."""
    ids = torch.randint(0, 4096, (tokens,), generator=torch.manual_seed(0))
    exact = Transformer(ModelConfig.nano())
    randomize(exact, 0)
    choices = Trace()
    expected = exact(ids, [tokens], trace=choices)
    rows: list[dict[str, object]] = []
    for name, precision in CASES.items():
        model = Transformer(ModelConfig.nano(), precision=precision)
        model.load_state_dict(exact.state_dict())
        free_choices = Trace()
        free = model(ids, [tokens], trace=free_choices)
        replayed = model(ids, [tokens], trace=choices.replay())
        same = [
            (free_choices.routes[n].sort(-1).values == choices.routes[n].sort(-1).values).all(-1)
            for n in choices.routes
        ]
        rows.append(
            {
                "switch": name,
                "free": relative_rms(free, expected),
                "replayed": relative_rms(replayed, expected),
                "same_experts": torch.stack(same).float().mean().item(),
                "same_argmax": (free.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.tokens)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"relative rms error of the logits, nano with random weights, {arguments.tokens} tokens")
    print(f"{'switch':32} {'free':>9} {'replayed':>9} {'same experts':>13} {'same argmax':>12}")
    for row in rows:
        print(
            f"{row['switch']:32} {row['free']:9.2e} {row['replayed']:9.2e} "
            f"{row['same_experts']:13.2%} {row['same_argmax']:12.2%}"
        )


if __name__ == "__main__":
    main()
