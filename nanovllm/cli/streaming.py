"""One request whose text is written as it comes, and Ctrl-C that ends the answer instead of the program.

Owns what `complete`, `chat` and `demo` share: that, and a model's start with the line that tells of it. Invariant: an
interrupt takes effect between two steps, so the engine is never left in the middle of one.
"""

import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from nanovllm.cli.options import engine_options, sampling_options
from nanovllm.llm import LLM
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Answer:
    """A finished or interrupted request. first_token_seconds: until the first text or token appeared."""

    output: RequestOutput
    seconds: float
    first_token_seconds: float

    @property
    def text(self) -> str:
        return self.output.outputs[0].text

    def summary(self) -> str:
        """Token counts and rates in one line."""
        num_tokens = len(self.output.outputs[0].token_ids)
        parts = [f"{len(self.output.prompt_token_ids)} prompt tokens, {num_tokens} output tokens"]
        if num_tokens > 1 and self.seconds > self.first_token_seconds:
            parts.append(f"{(num_tokens - 1) / (self.seconds - self.first_token_seconds):.1f} tok/s")
        parts.append(f"first token after {self.first_token_seconds * 1000:.0f} ms")
        return ", ".join(parts)


def start_llm(args: Namespace, model: str, **options: Any) -> LLM:
    """The model of a command, ready; unless --quiet, a line on standard error tells where and how large it is."""
    if lora_of(args) is not None:
        options["enable_lora"] = True
    llm = LLM(model, **{**engine_options(args), **options}, use_tqdm_on_load=not args.quiet)
    if not args.quiet:
        seconds = perf_counter() - args.start_time
        print(f"[{_describe(llm)}; ready in {seconds:.1f} s]", file=sys.stderr, flush=True)
    return llm


def lora_of(args: Namespace) -> LoRARequest | None:
    """The adapter of a command, if it takes one and was given one."""
    path = getattr(args, "lora", None)
    return None if path is None else LoRARequest(path, path)


def _describe(llm: LLM) -> str:
    """Device, dtype and what the KV cache holds, in words."""
    config, num_tokens = llm.config, llm.num_kv_cache_tokens
    at_once = min(num_tokens // config.max_model_len, config.max_num_seqs)
    longest = min(num_tokens, config.max_model_len)
    engines = f"{config.data_parallel_size} engines, each " if config.data_parallel_size > 1 else ""
    return (
        f"{engines}{config.device}, {config.dtype}, KV cache of {num_tokens:,} tokens: {max(at_once, 1):,} x "
        f"{longest:,} at once, or more that are shorter"
    )


def make_sampling_params(llm: LLM, args: Any, max_tokens: int | None) -> SamplingParams:
    """The model's default parameters, `max_tokens`, and over both what was given on the command line."""
    return replace(llm.get_default_sampling_params(), **{"max_tokens": max_tokens, **sampling_options(args)})


def stream_chat(
    llm: LLM,
    messages: Sequence[Mapping[str, str]],
    params: SamplingParams,
    write: Callable[[str], object],
    adapter: LoRARequest | None = None,
) -> Answer | None:
    """`stream_answer` for the prompt that a conversation makes, which is part of its time: so are imports, the first
    time.

    Raises ValueError without a chat template.
    """
    start = perf_counter()
    with _interrupts() as is_interrupted:
        (prompt,) = llm.preprocess_chat(messages)
        return _stream(llm, prompt, params, write, adapter, start, is_interrupted)


def stream_answer(
    llm: LLM,
    prompt: Any,
    params: SamplingParams,
    write: Callable[[str], object],
    adapter: LoRARequest | None = None,
) -> Answer | None:
    """Run one request, handing each new piece of text to `write`. Ctrl-C ends it early; None if nothing had come by
    then.

    Raises ValueError or TypeError, before anything runs, for a prompt that does not fit.
    """
    start = perf_counter()
    with _interrupts() as is_interrupted:
        return _stream(llm, prompt, params, write, adapter, start, is_interrupted)


def _stream(
    llm: LLM,
    prompt: Any,
    params: SamplingParams,
    write: Callable[[str], object],
    adapter: LoRARequest | None,
    start: float,
    is_interrupted: Callable[[], bool],
) -> Answer | None:
    first = 0.0
    num_written = 0
    latest: RequestOutput | None = None
    request_id = llm.add_request(prompt, params, lora_request=adapter)
    try:
        while llm.has_unfinished_requests() and not is_interrupted():
            for output in llm.step():
                if output.request_id == request_id:
                    first = first or perf_counter() - start
                    latest = output
                    write(output.outputs[0].text[num_written:])
                    num_written = len(output.outputs[0].text)
    finally:
        llm.abort_request(request_id)  # nothing, if it has ended
    return None if latest is None else Answer(latest, perf_counter() - start, first)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted; a second one raises KeyboardInterrupt as usual."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
