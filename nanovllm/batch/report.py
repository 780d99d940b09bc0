"""The report of a batch job: what became of its rows, as one HTML page with charts beside OUT.

Owns what is counted of results, and the page. Invariant: rows and tokens are those of the whole job, also of parts that
earlier starts computed; speed and share of the floor are of this run alone, which is said beside them.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from time import perf_counter
from typing import Any, NamedTuple

_ERRORS_SHOWN = 50
_BARS = 40
_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em 1.2em .2em 0; text-align: left; vertical-align: top; }
svg { width: 100%; height: 9em; } rect { fill: #0969da; } text { fill: currentColor; font: 11px system-ui; }
.dim { color: #656d76; } code { overflow-wrap: anywhere; }
"""


class Outcome(NamedTuple):
    """What a row's result says, of a table or of OpenAI's lines. finish_reasons: of each of its answers."""

    num_prompt_tokens: int
    num_output_tokens: int
    finish_reasons: list[str]
    error: str | None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Outcome":
        if "response" not in result:
            reasons = [result["finish_reason"]] if result["finish_reason"] else []
            num_prompt, num_output = result["num_prompt_tokens"] or 0, result["num_generated_tokens"] or 0
            return cls(num_prompt, num_output, reasons, result["error"])
        response = result["response"] or {}
        body = response.get("body") or {}
        usage, error = body.get("usage", {}), result["error"] or body.get("error")
        reasons = [choice["finish_reason"] for choice in body.get("choices", [])]
        failure = error["message"] if error else None
        return cls(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), reasons, failure)


class Speed:
    """Output tokens of this run over time, a number for each second."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self.num_rows = self.num_errors = self.num_prompt_tokens = self.num_output_tokens = 0
        self.by_second: Counter[int] = Counter()

    def add(self, outcome: Outcome) -> None:
        self.num_rows += 1
        self.num_errors += outcome.error is not None
        self.num_prompt_tokens += outcome.num_prompt_tokens
        self.num_output_tokens += outcome.num_output_tokens
        self.by_second[int(self.seconds)] += outcome.num_output_tokens

    @property
    def seconds(self) -> float:
        return max(perf_counter() - self._start, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.num_output_tokens / self.seconds


@dataclass
class Rows:
    """Of the whole job; 8 bytes of memory a row."""

    prompt_tokens: "array[int]" = field(default_factory=lambda: array("I"))
    output_tokens: "array[int]" = field(default_factory=lambda: array("I"))
    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_errors: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)  # (row, message), the first ones

    def add(self, number: int, outcome: Outcome) -> None:
        self.finish_reasons.update(outcome.finish_reasons)
        if outcome.error is not None:
            self.num_errors += 1
            if len(self.errors) < _ERRORS_SHOWN:
                self.errors.append((number, outcome.error))
        else:
            self.prompt_tokens.append(outcome.num_prompt_tokens)
            self.output_tokens.append(outcome.num_output_tokens)


def make_page(title: str, rows: Rows, speed: Speed, seconds: float, roofline: Mapping[str, Any] | None) -> str:
    """seconds: that this run took. roofline: of this run, as `roofline.report` has it."""
    num_rows = len(rows.prompt_tokens) + rows.num_errors
    facts = [
        ("rows", f"{num_rows:,}, {speed.num_rows:,} of them in this run"),
        ("failed", f"{rows.num_errors:,}"),
        ("tokens", f"{sum(rows.prompt_tokens):,} of prompts, {sum(rows.output_tokens):,} of output"),
        ("answers ended by", ", ".join(f"{why} {count:,}" for why, count in rows.finish_reasons.most_common()) or "-"),
    ]
    if speed.num_rows:
        output, prompt = speed.num_output_tokens / seconds, speed.num_prompt_tokens / seconds
        facts.append(("this run", f"{seconds:,.1f} s, {output:,.0f} output and {prompt:,.0f} prompt tokens/s"))
    if roofline is not None:
        facts.append(
            (
                "share of the floor",
                f"{100 * roofline['share_of_floor']:.0f} %: reading and multiplying what had to be would have taken "
                f"{roofline['floor_seconds']:,.1f} s at this device's measured speed",
            )
        )
    parts = [
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>\n<table>",
        *(f"<tr><th>{name}<td>{escape(value)}" for name, value in facts),
        "</table>",
    ]
    if speed.num_rows:
        values = [speed.by_second[second] for second in range(max(speed.by_second) + 1)]
        parts.append(_chart("Output tokens of rows that were done, by time", _squeeze(values), f"{len(values):,} s"))
    for name, lengths in (("Prompts", rows.prompt_tokens), ("Answers", rows.output_tokens)):
        if len(lengths):
            bars, width = _histogram(lengths)
            parts.append(_chart(f"{name}: rows by number of tokens", bars, f"{width * len(bars):,} tokens"))
    if rows.errors:
        parts.append(
            f"<h2>Rows that failed</h2><p class=dim>{rows.num_errors:,}, the first {len(rows.errors)}:</p><table>"
        )
        parts += [f"<tr><td>{number}<td><code>{escape(message)}</code>" for number, message in rows.errors]
        parts.append("</table>")
    return "\n".join(parts) + "\n</html>\n"


def _histogram(values: Sequence[int]) -> tuple[list[float], int]:
    """How many values are in each of at most _BARS ranges, and how wide these are."""
    width = max(values) // _BARS + 1
    counts = Counter(value // width for value in values)
    return [counts[i] for i in range(max(counts) + 1)], width


def _squeeze(values: Sequence[float]) -> list[float]:
    """Means of neighbours, so that at most 4 * _BARS are left."""
    width = -(-len(values) // (4 * _BARS))
    return [sum(values[i : i + width]) / len(values[i : i + width]) for i in range(0, len(values), width)]


def _chart(title: str, bars: Sequence[float], end: str) -> str:
    """Bars from 0 on; end: what stands below the right end."""
    top = max(bars) or 1
    width = 600 / len(bars)
    drawn = "".join(
        f'<rect x="{i * width:.1f}" y="{100 - 100 * bar / top:.1f}" width="{max(width - 1, 0.5):.1f}" '
        f'height="{100 * bar / top:.1f}"/>'
        for i, bar in enumerate(bars)
    )
    labels = f'<text x="605" y="10">{top:,.0f}</text><text x="0" y="114">0</text><text x="540" y="114">{end}</text>'
    return f'<h2>{title}</h2><svg viewBox="0 0 660 118" preserveAspectRatio="none">{drawn}{labels}</svg>'
