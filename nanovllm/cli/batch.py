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
from typing import Any

from tqdm import tqdm

from nanovllm import __version__
from nanovllm.async_llm import AsyncLLM
from nanovllm.batch.columns import NEW_COLUMNS, Columns, ColumnsJob, find_columns
from nanovllm.batch.job import Job, Write, input_digest, run_rows, write_out
from nanovllm.batch.journal import Journal
from nanovllm.batch.report import Outcome, Rows, Speed, make_page
from nanovllm.batch.tables import Row, Table, check_output, is_json_lines, open_table, write_json_lines
from nanovllm.cli.options import engine_options, sampling_options
from nanovllm.cli.streaming import make_sampling_params
from nanovllm.model_files.identity import identify
from nanovllm.model_files.locate import locate_model
from nanovllm.roofline import roofline
from nanovllm.roofline.ceilings import measure_ceilings
from nanovllm.roofline.model_size import model_size
from nanovllm.roofline.roofline import Ceilings, Work

_MAX_TOKENS = 256
_WINDOW = 2  # rows in flight for each that the engine runs at once: those that wait are tokenized by the time they run
_LOG_SECONDS = 60.0  # how often a log, where there is no terminal, hears of the progress
# Options that decide how much runs at once, and not what comes out: they may differ when a job goes on.
_HOW_MUCH = (
    "data_parallel_size", "distributed_executor_backend", "distributed_timeout_seconds", "engine_process",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_offload_gb", "max_num_batched_tokens", "max_num_seqs",
    "num_gpu_blocks_override", "overlap_depth", "prefix_store", "prefix_store_gb", "prefix_store_warm_gb", "trace",
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
        speed = Speed()

        def tell(result: Mapping[str, Any]) -> None:
            speed.add(Outcome.of(result))
            bar.set_postfix_str(f"{speed.tokens_per_second:,.0f} output tokens/s", refresh=False)
            bar.update()

        async def work() -> Mapping[str, float]:
            async with engine:
                await run_rows(paths.table, job, journal, window, tell)
                return await asyncio.to_thread(engine.llm.get_metrics)

        try:
            metrics = asyncio.run(work())
        except KeyboardInterrupt:
            print(f"\n[{journal.num_rows:,} rows are done; the same command goes on]", file=sys.stderr)
            raise
        run_seconds = speed.seconds
    rows = Rows()
    write_out(paths.out, paths.table, _Seen(job, rows), journal, paths.write, about)
    page = paths.out.with_name(paths.out.name + ".html")
    if not args.quiet:
        print(f"[{_summary(speed, run_seconds, journal.num_rows, num_before)}: {paths.out}; {page}]", file=sys.stderr)
    roofline = _roofline(engine, metrics, run_seconds) if speed.num_rows else None
    title = f"{paths.table.path.name} → {paths.out.name}, {args.model}"
    page.write_text(make_page(title, rows, speed, run_seconds, roofline), encoding="utf-8")


@dataclass(frozen=True)
class _Seen:
    """A job whose results the report sees on their way into OUT."""

    job: Job
    rows: Rows

    async def answer(self, row: Row) -> dict[str, Any]:
        return await self.job.answer(row)

    def merge(self, row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
        self.rows.add(row.number, Outcome.of(result))
        return self.job.merge(row, result)


def _roofline(engine: AsyncLLM, metrics: Mapping[str, float], seconds: float) -> Mapping[str, Any]:
    """Of the engine's whole work, on a device that is free again."""
    config, model_config = engine.llm.config, engine.llm.model_config
    one = measure_ceilings(config.device, config.dtype)
    num_devices = config.data_parallel_size * config.tensor_parallel_size if config.device.startswith("cuda") else 1
    ceilings = Ceilings(
        bytes_per_second=num_devices * one.bytes_per_second, flops_per_second=num_devices * one.flops_per_second
    )
    work = Work(**{name: int(metrics[name]) for name in Work.__dataclass_fields__})
    return roofline.report(
        work, model_size(model_config, config.quantization, config.kv_cache_dtype), ceilings, seconds
    )


def _summary(speed: Speed, seconds: float, num_all: int, num_before: int) -> str:
    before = f", {num_before:,} of them before" if num_before else ""
    return (
        f"{num_all:,} rows{before}; {speed.num_errors:,} of {speed.num_rows:,} with an error; "
        f"{speed.num_prompt_tokens:,} prompt and {speed.num_output_tokens:,} output tokens in {seconds:.1f} s "
        f"({speed.num_output_tokens / seconds:,.0f} output tokens/s)"
    )


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
