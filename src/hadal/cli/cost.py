"""`hadal cost`: what a model costs at a context length."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hadal.cli.quantities import human_bytes, human_count, parse_tokens
from hadal.cost import CONVENTIONS, KV_FORMATS, CostReport, estimate

__all__ = ["cost"]

ConventionName = Literal["fp8-equivalent", "raw", "fp32-parts", "fp8-core", "fp4-as-fp8"]
KVFormatName = Literal["fp8-fp4", "fp8-fp8", "bf16", "fp32"]
_COMPARED = ["v3.2", "v4-pro", "v4-flash"]


def cost(
    *,
    model: Annotated[list[str] | None, Parameter(name=["--model", "-m"])] = None,
    context: Annotated[int, Parameter(converter=parse_tokens)] = 1024**2,
    convention: ConventionName = "fp8-equivalent",
    kv: KVFormatName = "fp8-fp4",
    plot: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show parameters, FLOPs per token, KV and weight bytes of a model.

    Examples:
        hadal cost --model v4-pro --context 1M

        hadal cost -m v4-flash -m v3.2 --context 128K --json

        hadal cost -m path/to/config.json --kv bf16

        hadal cost --plot figure1.png

    Args:
        model: v4-flash, v4-pro, v4-flash-base, v4-pro-base, nano, v3.2, gqa8, or a config.json;
            repeat for several. Default: v4-pro.
        context: Tokens; K and M are binary (1M = 1,048,576), 1e6 is a million.
        convention: How FLOPs of different number formats add up.
        kv: How the cache is stored.
        plot: Also draw both curves against context length, up to CONTEXT, into this .png or .svg.
        json_output: Print one JSON object per model instead of tables.
    """
    for name in model or ["v4-pro"]:
        report = estimate(name, context, convention=convention, kv_format=kv)
        if json_output:
            print(json.dumps(report.to_json()))  # noqa: T201 - data goes to stdout
        else:
            _show(report)
    if plot is not None:
        from hadal.cost.figure import draw

        names = model if model and len(model) > 1 else [*_COMPARED, *(model or [])]
        draw(
            list(dict.fromkeys(names)),
            context,
            plot,
            convention=convention,
            kv_format=kv,
        )
        Console(stderr=True).print(f"wrote {plot}", highlight=False, markup=False)


def _show(report: CostReport) -> None:
    console = Console()
    console.print(f"[bold]{escape(report.model)}[/bold] at {report.context:,} tokens")
    if report.parameters:
        console.print(_parameters(report), _weights(report))
    if report.flops:
        console.print(_flops(report))
    console.print(_kv(report))
    for name, ratio in report.ratios.items():
        console.print(f"  {name.replace('_', ' ')}: {ratio:.2%}", highlight=False)
    console.print(f"[dim]FLOPs: {CONVENTIONS[report.convention].text}")
    console.print(f"[dim]KV: {KV_FORMATS[report.kv_format].text}; float32 tails not in the total")


def _parameters(report: CostReport) -> Table:
    table = _table("parameters", "", "")
    for part, number in report.parameters.items():
        table.add_row(part, human_count(number), f"{number / report.total_parameters:.1%}")
    table.add_section()
    table.add_row("total", human_count(report.total_parameters), "")
    table.add_row("active per token (no embedding)", human_count(report.active_parameters), "")
    table.add_row("MTP blocks, apart", human_count(report.mtp_parameters), "")
    return table


def _weights(report: CostReport) -> Table:
    total = sum(report.weight_bytes.values())
    table = _table(f"weights, {report.num_tensors:,} tensors with MTP", "", "")
    for dtype, size in report.weight_bytes.items():
        table.add_row(dtype, human_bytes(size), f"{size / total:.1%}")
    table.add_section()
    table.add_row("total", human_bytes(total), f"{total:,} B")
    return table


def _flops(report: CostReport) -> Table:
    table = _table("FLOPs of one token", "raw", "counted")
    for part in report.flops:
        counted = part.count * CONVENTIONS[report.convention].weight(part.format)
        table.add_row(f"{part.part} ({part.format})", human_count(part.count), human_count(counted))
    table.add_section()
    raw = sum(part.count for part in report.flops)
    table.add_row("total", human_count(raw), human_count(report.flops_per_token or 0))
    return table


def _kv(report: CostReport) -> Table:
    table = _table("KV of one sequence", "per token", "in all", "window", "fp32 tails")
    for layer in report.kv:
        table.add_row(
            f"{layer.num_layers} {layer.kind.upper()}",
            f"{layer.bytes_per_token:,.2f} B",
            human_bytes(layer.entries_bytes),
            human_bytes(layer.window_bytes),
            human_bytes(layer.tail_bytes),
        )
    table.add_section()
    table.add_row("total", f"{report.kv_bytes_per_token:,.2f} B", human_bytes(report.kv_bytes))
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns[:1], title_justify="left", box=None, padding=(0, 2))
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table
