"""`nanovllm bench chart FILES -o x.svg`: engines or layouts beside each other, from the benchmarks' JSON lines.

Owns which figure of a result is drawn and how. Invariant: a panel holds figures of one model and one workload only, and
each bar is a median from a file; of two results of the same engine or layout the later one counts.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

_OURS = "nanovllm"
_COLORS = {_OURS: "#2a6fdb", "vllm": "#9aa3ad", "nano-vllm": "#c3c9cf", "hf": "#dde1e5"}
_COLUMNS = 4


class Bar(NamedTuple):
    """spread: lowest and highest run, None where a file has one figure only."""

    value: float
    spread: tuple[float, float] | None


class Panel(NamedTuple):
    model: str
    title: str


def run(args: Namespace) -> int:
    if Path(args.output).suffix not in (".svg", ".png"):
        raise ValueError(f"--output must end in .svg or .png, got {args.output!r}")
    panels = collect(read_records(args.files))
    if args.compared_only:
        panels = {panel: bars for panel, bars in panels.items() if len(bars) > 1 and any(map(_is_ours, bars))}
    if not panels:
        raise ValueError(f"nothing to draw in {', '.join(args.files)}: no result of a kind that has a chart")
    draw(panels, args.output)
    print(args.output)
    return 0


def read_records(files: Iterable[str]) -> list[dict[str, Any]]:
    """Every JSON line of the files, in order. Raises ValueError for a line that is none."""
    records = []
    for name in files:
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number}, is not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get("results"), list):
                raise ValueError(f"{name}, line {number}, is not a result of nanovllm bench")
            records.append(record)
    return records


def collect(records: Iterable[dict[str, Any]]) -> dict[Panel, dict[str, Bar]]:
    """Panel -> engine or layout -> bar: model by model, otherwise in the order of the records."""
    panels: dict[Panel, dict[str, Bar]] = {}
    for record in records:
        for row in record["results"]:
            for title, bar in _bars(record["benchmark"], row):
                panels.setdefault(Panel(record["model"], title), {})[row.get("layout", row["engine"])] = bar
    models = list(dict.fromkeys(panel.model for panel in panels))
    return dict(sorted(panels.items(), key=lambda item: models.index(item[0].model)))


def _bars(kind: str, row: dict[str, Any]) -> Iterator[tuple[str, Bar]]:
    """What a result says, as (title with unit, bar)."""
    workload = row.get("workload", "")
    spread = (row["slowest"], row["fastest"]) if "fastest" in row else None
    if kind == "latency" and "first_token_ms" in row and row.get("num_prompts") == 1:
        yield "first token, ms (less is better)", Bar(row["first_token_ms"], None)
    if kind in ("latency", "parallel", "throughput") and "step_ms" in row:
        batch = re.fullmatch(r"decode_(\d+)|(\d+) x 128\+512", workload)  # two names of one workload
        name = f"batch {batch[1] or batch[2]}" if batch else workload
        yield f"decode, {name}, ms a step (less is better)", Bar(row["step_ms"], spread)
    elif kind == "quality":
        yield "perplexity (less is better)", Bar(row["perplexity"], None)
        if row["mean_kl"] > 0:  # plain's own is none
            yield "mean KL from plain, nats (less is better)", Bar(row["mean_kl"], None)
        yield "greedy token as plain's, share", Bar(row["agreement"], None)
    elif kind == "serve":
        yield f"{workload}:\noutput tok/s", Bar(row["output_tokens_per_second"], spread)  # in lines that fit a panel
        for name, text in (("first_token", "first token"), ("gap", "gap")):
            for share in ("p50", "p99"):
                yield f"{workload}:\n{text} {share}, ms (less is better)", Bar(row[f"{name}_{share}_ms"], None)
    elif kind == "start":
        for name, caches in (("cold_seconds", "nothing cached"), ("warm_seconds", "caches warm")):
            if name in row:
                yield f"start, {caches}, s (less is better)", Bar(row[name], None)
    elif kind == "attention":
        behind = f" behind {row['context_len']:,}" if row["context_len"] else ""
        yield f"attention of {row['prompt_len']:,} tokens{behind}, TFLOP/s", Bar(row["teraflops_per_second"], None)
    elif workload in ("prefill", "long_prompts") or kind == "prefill":
        rates = [row["num_prompt_tokens"] / seconds for seconds in row.get("seconds", ())]
        value = row.get("prompt_tokens_per_second") or median(rates)
        yield f"{workload}, prompt tok/s", Bar(value, (min(rates), max(rates)) if rates else None)
    elif kind in ("throughput", "prefix", "parallel"):
        yield f"{workload}, output tok/s", Bar(row["output_tokens_per_second"], spread)


def _is_ours(name: str) -> bool:
    return name == _OURS or name.startswith("tp")  # a layout: tensor and data parallel sizes


def draw(panels: dict[Panel, dict[str, Bar]], output: str) -> None:
    """One small bar chart a panel, into an SVG or PNG file."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a chart needs matplotlib: pip install 'nanovllm[bench]'") from error
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.7 + 1.7 * lines), layout="constrained")
    for number, (panel, bars) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, number)
        engines = sorted(bars, key=lambda engine: not _is_ours(engine))  # ours on top
        values = [bars[engine].value for engine in engines]
        axes.barh(engines, values, color=[_color(engine) for engine in engines], height=0.7)
        for place, engine in enumerate(engines):
            value, spread = bars[engine]
            if spread:
                axes.plot(sorted(spread), [place, place], color="black", linewidth=1.2)
            axes.annotate(f"  {_number(value)}", (max([value, *(spread or ())]), place), va="center", fontsize=8)
        axes.set_title(f"{panel.model}\n{panel.title}", fontsize=8, loc="left")
        axes.set_xlim(0, 1.25 * max(values))
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanovllm"}):  # text as text; the same file every time
        figure.savefig(output, dpi=150, metadata={"Date": None} if output.endswith(".svg") else None)


def _color(name: str) -> str:
    return _COLORS[_OURS] if _is_ours(name) else _COLORS.get(name, "#b8b8b8")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
