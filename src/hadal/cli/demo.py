"""`hadal demo`: what works today, end to end, in under a minute on a CPU."""

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["demo"]


def demo(*, json_output: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Write, convert, load and run a V4 network, plan a large one, and parse a broken tool call.

    Examples:
        hadal demo

    Args:
        json_output: Print the figures as JSON.
    """
    console = Console(stderr=json_output, highlight=False)
    with tempfile.TemporaryDirectory(prefix="hadal-demo-") as folder:
        figures = _checkpoints(console, Path(folder)) | _arithmetic(console, Path(folder))
    figures |= _plan(console) | _format(console)
    if json_output:
        print(json.dumps(figures))  # noqa: T201 - data goes to stdout
    console.print("\nNext: `hadal cost --help`, `hadal checkpoint --help`, README.md")


def _checkpoints(console: Console, folder: Path) -> dict[str, Any]:
    from hadal.checkpoint import CheckpointSource, convert, make_random
    from hadal.config import ModelConfig

    config = ModelConfig.nano().quantized("instruct")
    make_random(config, folder / "official", seed=1)
    convert(folder / "official", folder / "huggingface", layout="huggingface")
    convert(folder / "huggingface", folder / "back", layout="official")
    with (
        CheckpointSource.open(folder / "official") as first,
        CheckpointSource.open(folder / "back") as second,
    ):
        same = all(_same_bits(first.read(n), second.read(n)) for n in first.specs)
        count = len(first.specs)
    console.print(
        f"1. nano, random weights, FP4 experts and FP8: {count} tensors; official -> Hugging Face "
        f"-> official: {'identical' if same else 'DIFFERENT'}"
    )
    return {"tensors": count, "layouts_identical": same}


def _same_bits(a: "Tensor", b: "Tensor") -> bool:
    import torch

    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _arithmetic(console: Console, folder: Path) -> dict[str, Any]:
    import torch

    from hadal.checkpoint import load
    from hadal.model import Precision

    model = load(folder / "official", storage="plain", dtype=torch.float32)
    exact = load(
        folder / "official", storage="plain", dtype=torch.float32, precision=Precision.exact()
    )
    ids = torch.randint(0, model.config.vocab_size, (600,), generator=torch.manual_seed(0))
    with torch.no_grad():
        whole = exact(ids, [600])
        cache = exact.new_cache()
        start = time.monotonic()
        parts = [exact(ids[:400], [400], [cache])]
        prefill_s = time.monotonic() - start
        start = time.monotonic()
        parts += [exact(ids[i : i + 1], [1], [cache]) for i in range(400, 440)]
        decode_s = (time.monotonic() - start) / 40
        parts.append(exact(ids[440:], [160], [cache]))
        worst = (torch.cat(parts) - whole).abs().max().item()
        rounded = (model(ids, [600]) - whole).square().mean().sqrt().item()
    console.print(
        f"2. 600 tokens whole, against prefill + 40 decodes + a chunk: logits differ by {worst:.1e}"
    )
    console.print(
        f"   (eager reference code: prefill {400 / prefill_s:,.0f} tokens/s, decode "
        f"{decode_s * 1e3:.0f} ms a token)"
    )
    console.print(
        f"3. the published roundings (FP8 activations and KV, FP4 index) move its logits by "
        f"{rounded:.3f} rms, of {whole.square().mean().sqrt():.3f}"
    )
    return {"max_difference": worst, "rounding_rms": rounded}


def _plan(console: Console) -> dict[str, Any]:
    from hadal.cost import estimate

    reports = {name: estimate(name, 1024**2) for name in ("v4-flash", "v4-pro")}
    for name, report in reports.items():
        console.print(
            f"4. {name} at a million tokens: {report.ratios['flops_of_v3.2']:.0%} of V3.2's FLOPs "
            f"and {report.ratios['kv_of_v3.2']:.1%} of its KV ({report.kv_bytes / 1e9:.1f} GB)"
        )
    return {name: report.ratios for name, report in reports.items()}


def _format(console: Console) -> dict[str, Any]:
    from hadal.encoding import Encoding

    encoding = Encoding.load("v4")
    arguments = {"path": "a.py", "text": 'print("<b>")', "count": 2}
    call = {"id": "1", "function": {"name": "edit", "arguments": arguments}}
    asked: dict[str, Any] = {"role": "user", "content": "Edit a.py."}
    called: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = encoding.render([asked, called], mode="chat")
    completion = text[len(encoding.render([asked], mode="chat")) :]
    stream = encoding.stream(start="content")
    for char in completion:
        stream.feed(char)
    result = stream.finish()
    same = json.loads(result.tool_calls[0].arguments) == arguments
    console.print(
        f"5. a tool call in {len(completion)} characters of DSML, streamed one at a time: "
        f"arguments {'identical' if same else 'DIFFERENT'}"
    )
    broken = encoding.parse(completion[:150], start="content")
    console.print(f"   cut at character 150: {broken.termination}, nothing lost")
    return {"call_identical": same, "cut_call": str(broken.termination)}
