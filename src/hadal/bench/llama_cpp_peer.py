"""llama.cpp as a peer: our weights as GGUF, in an environment of its own, on the same CPU.

It keeps routed experts in MXFP4 and rounds activations to 8 bits where it multiplies with them, and
keeps keys in float16; so its tokens are not ours, and `agreement` says how far apart the two are.
"""

import random
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from hadal.bench.networks import NetworkName, network
from hadal.bench.side import SideProcess
from hadal.errors import InputError
from hadal.model import Precision

__all__ = ["HOW_TO_GET_IT", "agreement", "start"]

HOW_TO_GET_IT: Final = (
    "llama.cpp was not run: `python -m venv ENV && ENV/bin/pip install llama-cpp-python==0.3.36` "
    "builds it (a compiler and ten minutes), then give --llama-cpp ENV/bin/python"
)


def start(stack: ExitStack, python: Path, file: Path) -> SideProcess:
    """Start the peer on a network; it ends with the stack.

    Args:
        stack: Closed when the peer is no longer needed.
        python: Of an environment with llama-cpp-python.
        file: The network as GGUF.

    Raises:
        InputError: There is no such program.
    """
    if not python.is_file():
        raise InputError(f"--llama-cpp: there is no {python}", hint=HOW_TO_GET_IT)
    script = Path(__file__).with_name("llama_cpp_side.py")
    command = [str(python), str(script), str(file), str(torch.get_num_threads())]
    return stack.enter_context(SideProcess(command))


def agreement(side: SideProcess, name: NetworkName, tokens: int = 512) -> dict[str, float]:
    """Compare the peer's logits with ours, whose experts have the same FP4 values.

    Returns:
        Errors of the logits beside their standard deviation, and how many argmaxes are equal.
    """
    model = network(name, precision=replace(Precision.exact(), expert_weights_fp4=True))
    rng = random.Random(0)
    ids = [rng.randrange(2, model.config.vocab_size) for _ in range(tokens)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits"
        side.ask({"logits": ids, "file": str(file)})
        theirs = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
    with torch.inference_mode():
        ours = model(torch.tensor(ids), [tokens], [model.new_cache()])
    error = (theirs.view_as(ours) - ours).abs()
    return {
        "standard deviation of the logits": float(ours.std()),
        "largest error of a logit": float(error.max()),
        "rms error": float(error.square().mean().sqrt()),
        "median over tokens of the largest error": float(error.amax(1).median()),
        "share of equal argmaxes": float(
            (theirs.view_as(ours).argmax(1) == ours.argmax(1)).double().mean()
        ),
    }
