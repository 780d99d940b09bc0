"""LLM: the whole engine behind one object, with vLLM's offline interface.

Owns the user's view: prompts in, RequestOutputs out in order, progress, and the end of the engine's life; requests run
in a `Session`, so any thread may call anything. Invariant: a call that raises for bad input has queued nothing; a call
that is interrupted leaves nothing of its own behind.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.beam_search import BeamSearchParams, search_prompts
from nanovllm.build import build_engine
from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.output_processor import Marks
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.errors import RequestError
from nanovllm.outputs import BeamSearchOutput, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.scoring import score
from nanovllm.stepping import SteppedRequests
from nanovllm.vllm_options import refuse_absent
from nanovllm.vllm_surface import Message, VLLMSurface, is_conversation


class LLM(VLLMSurface):
    """Load a model and generate with it, in this process.

        with LLM("demo") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=20)):
                print(output.outputs[0].text)

    model and options are the fields of `EngineConfig`. Raises TypeError for an unknown option, ValueError for a value,
    model or checkpoint that cannot run, ConnectionError if a download fails. Any thread may call it; what several ask
    for runs in one batch.
    """

    def __init__(self, model: str, **options: Any) -> None:
        parts = build_engine(EngineConfig(model=model, **options))
        self.config = parts.config
        self.model_config = parts.model_config
        self.num_kv_cache_tokens = parts.num_cache_tokens  # of one engine, where there are several
        self._engine = parts.engine
        self._session = Session(parts.engine)
        self._input_processor = parts.input_processor
        self._tokenizer = parts.tokenizer
        self._hf_config = parts.hf_config
        self._generation_config = parts.generation_config
        self._start_times = parts.start_times
        self._output_processor = parts.engine.output_processor
        self._stepped = SteppedRequests(self._session, self._output_processor.mark, self._make_output)

    # -- whole batches --

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **absent: Any,
    ) -> list[RequestOutput]:
        """Complete each prompt; the results come in the order of the prompts.

        prompts: one or a list of strings, token-id lists, or {"prompt_token_ids": [...]}. sampling_params: one for all,
        or one for each; None takes `get_default_sampling_params()`. absent: vLLM's arguments that are not here, which
        may say that they are off. Raises ValueError or TypeError that names the item
        at fault before anything is queued. A request that fails later, say in a Python logits processor, ends with
        finish_reason "error" and its reason, and the others go on; where `prompts` is one prompt, that is RequestError.
        """
        if absent:
            refuse_absent("LLM.generate", absent)
        given: Any = prompts if isinstance(prompts, _NO_LISTS) else list(prompts)
        inbox = Inbox(self._make_output)
        handles = [Handle(group, inbox, only_ends=True) for group in self._process(given, sampling_params)]
        outputs: dict[Handle, RequestOutput] = {}
        with _Progress(len(handles), use_tqdm) as progress:
            for handle, output in self._session.run(handles, inbox):
                outputs[handle] = output
                progress.count(output)
        results = [outputs[handle] for handle in handles]
        if _is_one(given):
            _raise_error_of(results)
        return results

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yield what is new as it comes: a request's outputs are deltas that add up to the whole.

        Yields no order across prompts; `request_id` rises with the prompts' order, and an output holds those of its
        `n` sequences that have news. Bad input raises here, at the call. Leaving the loop early, closing the iterator,
        or an exception cancels what is unfinished and frees its blocks. Several streams, `generate` and `step` may
        take turns: each sees its own requests only.
        """
        given: Any = prompts if isinstance(prompts, _NO_LISTS) else list(prompts)
        inbox = Inbox(self._output_processor.mark)
        handles = [Handle(group, inbox, only_ends=False) for group in self._process(given, sampling_params)]
        return self._stream(handles, inbox, _is_one(given))

    def _stream(self, handles: list[Handle], inbox: Inbox[Marks], is_one: bool) -> Iterator[RequestOutput]:
        seen: dict[Handle, Marks] = {}
        for handle, marks in self._session.run(handles, inbox):
            new = self._make_output(handle.requests, marks, seen.get(handle, ()))
            seen[handle] = marks
            if new.outputs:
                yield new
            if is_one:
                _raise_error_of([new])

    def _process(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[list[Request]]:
        """The sequences of each prompt, checked and not queued."""
        self._session.check_open()
        prompts = _as_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"got {len(sampling_params)} sampling_params for {len(prompts)} prompts; give one for all or one each"
            )
        with self._session.numbers(len(prompts)) as numbers:
            return [
                self._input_processor.process(prompt, params, f"prompts[{i}]", number)
                for i, (prompt, params, number) in enumerate(zip(prompts, sampling_params, numbers, strict=True))
            ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list. options: of `preprocess_chat`, which makes prompts of them."""
        results = self.generate(self.preprocess_chat(messages, **options), sampling_params, use_tqdm)
        if is_conversation(messages):
            _raise_error_of(results)
        return results

    # -- other questions than "what comes next" --

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """For each prompt the `beam_width` most likely continuations that a beam search finds, best first."""
        self._session.check_open()

        def generate(beams: list[list[int]], step: SamplingParams) -> list[RequestOutput]:
            results = self.generate(beams, step, use_tqdm=False)
            _raise_error_of(results)
            return results

        about = self._input_processor, self._tokenizer, self.config.max_model_len
        return search_prompts(generate, *about, _as_list(prompts), params, use_tqdm)

    def score(self, prefix: Prompt, options: Sequence[str | Sequence[int]]) -> list[float]:
        """Log-likelihood of each option given the prefix: the sum of its tokens' log-probabilities (natural log).

        An option is a string or token ids. Strings are tokenized by themselves, so begin them with the space that a
        prefix without one calls for. With prefix caching, which is on by default, the prefix is computed once.
        """
        return score(self._session, self._input_processor, prefix, options)

    # -- one step at a time --

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a prompt for `step`; returns its id. Raises ValueError for a bad prompt or an id that is in use."""
        self._session.check_open()
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        handle = self._make_handle(prompt, params, request_id, self._stepped.inbox)
        self._session.submit(handle)
        return handle.request_id

    def _make_handle(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, inbox: Inbox[Marks]
    ) -> Handle:
        """One prompt, checked and not queued."""
        with self._session.numbers(1) as (number,):
            group = self._input_processor.process(prompt, params, "prompt", number, request_id)
        return Handle(group, inbox, only_ends=params.output_kind is RequestOutputKind.FINAL_ONLY)

    def step(self) -> list[RequestOutput]:
        """Advance by one step; returns the requests of `add_request` that got tokens or ended.

        Each has what `SamplingParams.output_kind` says: all its output so far, what is new, or nothing before its end.
        """
        return self._stepped.step()

    def has_unfinished_requests(self) -> bool:
        return self._session.has_unfinished_requests() or not self._stepped.are_all_returned()

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Stop requests, each with all its sequences. An id that has ended, or never was, is passed over.

        Those of `add_request` are forgotten. A call that waits for one gets it with the finish reason "abort".
        """
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            handle = self._session.find(name)
            if handle is not None and handle.inbox is self._stepped.inbox:
                self._session.cancel([handle])
            elif handle is not None:
                self._session.abort(handle)

    def _make_output(
        self, group: Sequence[Request], marks: Marks | None = None, since: Marks | None = None
    ) -> RequestOutput:
        output = self._output_processor.make_output(group, marks, since)
        for completion in output.outputs:
            if completion.hidden_states is not None:
                parts = completion.hidden_states
                completion.hidden_states = {layer: torch.cat(parts[layer]).float() for layer in parts}
        return output

    # -- about the engine --

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._known_tokenizer().hf

    def __repr__(self) -> str:
        config = self.config
        return (
            f"LLM({config.model!r}, device={config.device!r}, dtype={config.dtype!r}, "
            f"max_model_len={config.max_model_len}, num_kv_cache_tokens={self.num_kv_cache_tokens})"
        )

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """Call function(model) on each worker's model, to look inside; returns the results."""
        return self._session.exclusively(partial(self._engine.apply_model, function))

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with what the model's generation_config.json sets."""
        stated = self._generation_config
        names = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        names["max_new_tokens"] = "max_tokens"
        options = {ours: stated[name] for name, ours in names.items() if stated.get(name) is not None}
        if stated.get("do_sample") is False:
            options["temperature"] = 0.0
        return SamplingParams(**options)

    def get_metrics(self) -> dict[str, float]:
        """Counters since the start: steps, tokens, cache hits, preemptions, and where time went:

        host_seconds planning and taking in results, execute_seconds queueing steps (on a CPU: running them),
        wait_seconds waiting for the device. What steps had to read and multiply follows from num_steps (weights),
        num_tokens_computed, num_tokens_sampled (the head), num_context_tokens_read (KV) and num_query_key_pairs
        (attention). start_*_seconds: the parts of the start (`build.StartTimes`).
        """
        start = {f"start_{name}": seconds for name, seconds in asdict(self._start_times).items()}
        return {**self._session.exclusively(self._engine.get_metrics), **start}

    def reset_prefix_cache(self) -> None:
        """Forget what earlier requests left in the KV cache."""
        self._session.exclusively(self._engine.reset_prefix_cache)

    def close(self) -> None:
        """Free the model and the KV cache. May be called twice; later calls to anything else raise RuntimeError."""
        self._session.close()

    @property
    def _is_closed(self) -> bool:
        return self._session.is_closed

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer (skip_tokenizer_init=True); pass token ids")
        return self._tokenizer


class _Progress:
    """A bar over requests, with prompt and output tokens a second."""

    def __init__(self, num_requests: int, is_shown: bool) -> None:
        self._bar = tqdm(
            total=num_requests, desc="Generating", unit=" prompts", disable=not is_shown, dynamic_ncols=True
        )
        self._start = time.perf_counter()
        self._num_prompt_tokens = self._num_output_tokens = 0

    def count(self, output: RequestOutput) -> None:
        self._num_prompt_tokens += len(output.prompt_token_ids)
        self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = time.perf_counter() - self._start
        self._bar.set_postfix_str(
            f"prompt {self._num_prompt_tokens / seconds:.0f} tok/s, "
            f"output {self._num_output_tokens / seconds:.0f} tok/s",
            refresh=False,
        )
        self._bar.update()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _raise_error_of(outputs: Iterable[RequestOutput]) -> None:
    for completion in (completion for output in outputs for completion in output.outputs):
        if completion.error is not None:
            raise RequestError(completion.error)


_NO_LISTS = (str, Mapping, bytes, bytearray, memoryview)  # bytes are no prompt, and no list of token ids either


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several -> several."""
    prompts = prompts if isinstance(prompts, _NO_LISTS) else list(prompts)
    return [prompts] if _is_one(prompts) else prompts


def _is_one(prompts: Any) -> bool:
    """Is this one prompt, and no list of them? A flat list of integers is one."""
    if isinstance(prompts, _NO_LISTS):
        return True
    # An array has __index__ too: only one without dimensions is a number.
    return bool(prompts) and all(hasattr(item, "__index__") and not getattr(item, "ndim", 0) for item in prompts)
