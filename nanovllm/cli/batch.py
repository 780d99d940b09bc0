"""`nanovllm batch`: all rows of a file through the engine, in a job that may be killed at any moment and goes on.

Owns the command: what is checked before a model is loaded, progress, and the report. Invariant: a file, column or
option that cannot work is refused before the model is loaded, and what is on disk by then stays as it is.
"""

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from nanovllm import __version__
from nanovllm.async_llm import AsyncLLM
from nanovllm.batch.columns import NEW_COLUMNS, Columns, ColumnsJob, find_columns
from nanovllm.batch.identity import identify
from nanovllm.batch.job import Job, Write, input_digest, run_rows, write_out
from nanovllm.batch.journal import Journal
from nanovllm.batch.tables import Table, check_output, is_json_lines, open_table, write_json_lines
from nanovllm.cli.options import engine_options, sampling_options
from nanovllm.cli.streaming import make_sampling_params
from nanovllm.model_files.locate import locate_model

_MAX_TOKENS = 256
_WINDOW = 2  # rows in flight for each that the engine runs at once: those that wait are tokenized by the time they run
_LOG_SECONDS = 60.0  # how often a log, where there is no terminal, hears of the progress
# Options that decide how much runs at once, and not what comes out: they may differ when a job goes on.
_HOW_MUCH = (
    "data_parallel_size", "distributed_executor_backend", "distributed_timeout_seconds", "engine_process",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs",
    "num_gpu_blocks_override", "overlap_depth", "trace",
)  # fmt: skip


def run(args: Namespace) -> int:
    table, out = open_table(Path(args.input)), Path(args.output)
    check_output(table, out)
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {str(out.parent)!r} for OUT")
    if out.exists() and out.samefile(table.path):
        raise ValueError("IN and OUT are the same file")
    columns = _find_columns(table, args)
    about = _about(args, columns)
    journal_path = out.with_name(out.name + ".journal")
    if out.exists() and not journal_path.exists() and not args.restart:
        raise ValueError(
            f"{out} exists, and is of no job that goes on; choose another name, or --restart to replace it"
        )
    journal = Journal(journal_path, about, args.restart)
    try:
        if journal.done_digest is not None:
            return _check_done(table, out, journal)
        _run(args, _Paths(table, out), columns, journal, about)
    finally:
        journal.close()
    return 0


@dataclass(frozen=True)
class _Paths:
    table: Table
    out: Path

    @property
    def write(self) -> Write:
        if is_json_lines(self.out):
            return write_json_lines
        return partial(self.table.write, new_columns=NEW_COLUMNS)


def _find_columns(table: Table, args: Namespace) -> Columns | None:
    """By the first row that can be read. None for OpenAI's lines."""
    first = next((row.fields for row in table.rows() if row.problem is None), None)
    if first is None:
        raise ValueError(f"{table.path} has no row that can be read")
    is_asked = args.prompt_column is not None or args.messages_column is not None
    if is_asked or not {"custom_id", "url", "body"} <= first.keys():
        return find_columns(first, args.prompt_column, args.messages_column)
    given = sampling_options(args)
    if given:
        raise ValueError(f"OpenAI's batch lines have their own parameters; leave out {', '.join(given)}")
    return None


def _about(args: Namespace, columns: Columns | None) -> dict[str, Any]:
    """What the results depend on, as JSON gives it back."""
    engine = engine_options(args)
    model = locate_model(args.model, engine.get("revision"), with_weights=True)
    about = {
        "version": __version__,
        "model": identify(model),
        "form": "OpenAI's lines" if columns is None else vars(columns),
        "names": args.served_model_name,
        "sampling options": sampling_options(args),
        "engine options": {name: value for name, value in engine.items() if name not in _HOW_MUCH},
    }
    known: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return known


def _check_done(table: Table, out: Path, journal: Journal) -> int:
    if not out.exists():
        raise ValueError(f"this job is done, but {out} is gone; --restart computes it again")
    if input_digest(table) != journal.done_digest:
        raise ValueError(f"{table.path} has changed since {out} was written; --restart computes it anew")
    print(f"[{out} is complete; nothing to do]", file=sys.stderr)
    return 0


def _run(args: Namespace, paths: _Paths, columns: Columns | None, journal: Journal, about: Mapping[str, Any]) -> None:
    num_rows, num_before = paths.table.count(), journal.num_rows
    seconds = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    engine = AsyncLLM(args.model, **engine_options(args), use_tqdm_on_load=not args.quiet)
    config = engine.llm.config
    window = _WINDOW * config.max_num_seqs * config.data_parallel_size
    job = _make_job(engine, args, columns)
    with tqdm(
        total=num_rows, initial=num_before, unit=" rows", disable=args.quiet, dynamic_ncols=True,
        mininterval=seconds, maxinterval=max(seconds, 10),
    ) as bar:  # fmt: skip
        counts = _Counts(bar)

        async def work() -> None:
            async with engine:
                await run_rows(paths.table, job, journal, window, counts.add)

        try:
            asyncio.run(work())
        except KeyboardInterrupt:
            print(f"\n[{journal.num_rows:,} rows are done; the same command goes on]", file=sys.stderr)
            raise
    write_out(paths.out, paths.table, job, journal, paths.write, about)
    if not args.quiet:
        print(f"[{counts.summary(journal.num_rows, num_before)}: {paths.out}]", file=sys.stderr)


def _make_job(engine: AsyncLLM, args: Namespace, columns: Columns | None) -> Job:
    if columns is not None:
        return ColumnsJob(engine, columns, make_sampling_params(engine.llm, args, _MAX_TOKENS))
    try:
        from nanovllm.batch.openai_lines import OpenAILinesJob
    except ImportError as error:
        raise ImportError(
            f"OpenAI's batch lines need the extra `serve`: pip install 'nanovllm[serve]' ({error})"
        ) from error
    return OpenAILinesJob(engine, args.served_model_name or [args.model])


class _Counts:
    """Rows and tokens of this run, on a bar and in the report."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._start = perf_counter()
        self._num_rows = self._num_errors = self._num_prompt_tokens = self._num_output_tokens = 0

    def add(self, result: Mapping[str, Any]) -> None:
        num_prompt, num_output, is_error = _read(result)
        self._num_rows += 1
        self._num_errors += is_error
        self._num_prompt_tokens += num_prompt
        self._num_output_tokens += num_output
        self._bar.set_postfix_str(f"{self._num_output_tokens / self._seconds():,.0f} output tokens/s", refresh=False)
        self._bar.update()

    def summary(self, num_all: int, num_before: int) -> str:
        seconds = self._seconds()
        before = f", {num_before:,} of them before" if num_before else ""
        return (
            f"{num_all:,} rows{before}; {self._num_errors:,} of {self._num_rows:,} with an error; "
            f"{self._num_prompt_tokens:,} prompt and {self._num_output_tokens:,} output tokens in {seconds:.1f} s "
            f"({self._num_output_tokens / seconds:,.0f} output tokens/s)"
        )

    def _seconds(self) -> float:
        return max(perf_counter() - self._start, 1e-9)


def _read(result: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Prompt tokens, output tokens, and whether something went wrong."""
    if "response" not in result:
        return result["num_prompt_tokens"] or 0, result["num_generated_tokens"] or 0, result["error"] is not None
    response = result["response"] or {}
    usage = (response.get("body") or {}).get("usage", {})
    return usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), response.get("status_code") != 200
