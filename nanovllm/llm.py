"""LLM: the whole engine behind one object, with vLLM's offline interface.

Owns the user's view: prompts in, RequestOutputs out in order, progress, and the end of the engine's life. Invariant: a
call that raises for bad input has queued nothing; a call that is interrupted leaves nothing of its own behind.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.beam_search import BeamSearchParams, beam_search
from nanovllm.build import build_engine
from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.request import Request
from nanovllm.errors import RequestError
from nanovllm.outputs import BeamSearchOutput, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.scoring import SCORE_PARAMS, check_options, log_likelihood, skip_prefix

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Inbox = dict[str, list[Request]]  # by request id, the sequences of those that changed and were not looked at since


@dataclass(frozen=True)
class _Group:
    """The sequences of one request, and where its caller looks for news of it: of every token, or of ends alone."""

    requests: list[Request]
    inbox: Inbox
    only_ends: bool

    @property
    def is_finished(self) -> bool:
        return all(request.is_finished for request in self.requests)


class LLM:
    """Load a model and generate with it, in this process.

        with LLM("demo") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=20)):
                print(output.outputs[0].text)

    model and options are the fields of `EngineConfig`. Raises TypeError for an unknown option, ValueError for a value,
    model or checkpoint that cannot run, ConnectionError if a download fails.
    """

    def __init__(self, model: str, **options: Any) -> None:
        parts = build_engine(EngineConfig(model=model, **options))
        self.config = parts.config
        self.model_config = parts.model_config
        self._engine = parts.engine
        self._input_processor = parts.input_processor
        self._tokenizer = parts.tokenizer
        self._generation_config = parts.generation_config
        self._start_times = parts.start_times
        self._next_number = 0
        self._groups: dict[str, _Group] = {}  # unfinished ones
        self._inbox: Inbox = {}  # of `add_request` and `step`
        self._is_closed = False

    # -- whole batches --

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; the results come in the order of the prompts.

        prompts: one or a list of strings, token-id lists, or {"prompt_token_ids": [...]}. sampling_params: one for all,
        or one for each; None takes `get_default_sampling_params()`. Raises ValueError or TypeError that names the item
        at fault before anything is queued. A request that fails later, say in a Python logits processor, ends with
        finish_reason "error" and its reason, and the others go on; where `prompts` is one prompt, that is RequestError.
        """
        given: Any = prompts if isinstance(prompts, (str, Mapping)) else list(prompts)
        requests = self._process(given, sampling_params)
        outputs: dict[str, RequestOutput] = {}
        with _Progress(len(requests), use_tqdm) as progress:
            for group in self._run(requests, only_ends=True):
                if all(request.is_finished for request in group):
                    output = self._make_output(group, RequestOutputKind.FINAL_ONLY)
                    outputs[output.request_id] = output
                    progress.count(output)
        results = [outputs[group[0].request_id] for group in requests]
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
        given: Any = prompts if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._stream(self._process(given, sampling_params), _is_one(given))

    def _stream(self, requests: list[list[Request]], is_one: bool) -> Iterator[RequestOutput]:
        for group in self._run(requests, only_ends=False):
            output = self._make_output(group, RequestOutputKind.DELTA)
            if output.outputs:
                yield output
            if is_one:
                _raise_error_of([output])

    def _process(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[list[Request]]:
        """The sequences of each prompt, checked and not queued."""
        self._check_open()
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
        numbers = self._free_numbers()
        requests = [
            self._input_processor.process(prompt, params, f"prompts[{i}]", next(numbers))
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]
        self._next_number = next(numbers)
        return requests

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list, laid out by the model's chat template."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        if not all(conversations):
            raise ValueError("messages is empty; give at least one {'role': ..., 'content': ...}")
        tokenizer = self._known_tokenizer()
        prompts = [
            tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )
            for conversation in conversations
        ]
        results = self.generate(prompts, sampling_params, use_tqdm)
        if conversations is not messages:
            _raise_error_of(results)
        return results

    def _run(self, groups: list[list[Request]], only_ends: bool) -> Iterator[list[Request]]:
        """Queue these, yield each of them that has news until all have ended; whatever ends the loop cancels the rest.

        Generators end in `finally` when they are closed or forgotten, so nothing has to be called.
        """
        inbox: Inbox = {}
        unfinished = deque(group[0].request_id for group in groups)
        try:
            for group in groups:
                self._add(group, inbox, only_ends)
            while True:
                while inbox:
                    yield inbox.pop(next(iter(inbox)))
                while unfinished and unfinished[0] not in self._groups:
                    unfinished.popleft()
                if not unfinished:
                    return
                self._step()
        finally:
            for group in groups:
                self._abort(group)

    # -- other questions than "what comes next" --

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """For each prompt the `beam_width` most likely continuations that a beam search finds, best first."""
        self._check_open()
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, got {params!r}")
        max_model_len = self.config.max_model_len
        longest = max_model_len - params.max_tokens
        token_ids = [self._input_processor.read_prompt(p, f"prompts[{i}]") for i, p in enumerate(_as_list(prompts))]
        for i, ids in enumerate(token_ids):
            if len(ids) > longest:
                raise ValueError(
                    f"prompts[{i}] has {len(ids)} tokens; with max_tokens={params.max_tokens} and max_model_len="
                    f"{max_model_len} there is room for {max(longest, 0)}"
                )
        with tqdm(total=params.max_tokens, desc="Beam search", unit=" tokens", disable=not use_tqdm) as progress:

            def generate(beams: list[list[int]], step: SamplingParams) -> list[RequestOutput]:
                progress.update()
                results = self.generate(beams, step, use_tqdm=False)
                _raise_error_of(results)
                return results

            outputs = beam_search(generate, token_ids, params, self._input_processor.eos_token_ids)
        for sequence in (sequence for output in outputs for sequence in output.sequences):
            if self._tokenizer is not None:
                sequence.text = self._tokenizer.decode(sequence.tokens[sequence.num_prompt_tokens :])
        return outputs

    def score(self, prefix: Prompt, options: Sequence[str | Sequence[int]]) -> list[float]:
        """Log-likelihood of each option given the prefix: the sum of its tokens' log-probabilities (natural log).

        An option is a string or token ids. Strings are tokenized by themselves, so begin them with the space that a
        prefix without one calls for. With prefix caching, which is on by default, the prefix is computed once.
        """
        self._check_open()
        check_options(options)
        prefix_ids = self._input_processor.read_prompt(prefix, "prefix")
        groups = []
        numbers = self._free_numbers()
        for index, option in enumerate(options):
            name = f"options[{index}]"
            token_ids = prefix_ids + self._input_processor.read_continuation(option, name)
            groups.append(self._input_processor.process(token_ids, SCORE_PARAMS, name, next(numbers)))
            skip_prefix(groups[-1][0], len(prefix_ids))
        self._next_number = next(numbers)
        for _ in self._run(groups, only_ends=True):
            pass
        return [log_likelihood(request) for (request,) in groups]

    # -- one step at a time --

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a prompt for `step`; returns its id. Raises ValueError for a bad prompt or an id that is in use."""
        self._check_open()
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        numbers = self._free_numbers()
        group = self._input_processor.process(prompt, params, "prompt", next(numbers), request_id)
        self._add(group, self._inbox, only_ends=False)
        self._next_number = next(numbers)
        return group[0].request_id

    def step(self) -> list[RequestOutput]:
        """Advance by one step; returns the requests of `add_request` that got tokens or ended.

        Each has what `SamplingParams.output_kind` says: all its output so far, what is new, or nothing before its end.
        """
        self._step()
        outputs = []
        while self._inbox:
            group = self._inbox.pop(next(iter(self._inbox)))
            kind = group[0].params.output_kind
            if kind is RequestOutputKind.FINAL_ONLY and not all(request.is_finished for request in group):
                continue
            output = self._make_output(group, kind)
            if output.outputs:
                outputs.append(output)
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups or self._inbox)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Stop and forget requests, each with all its sequences. An id that has ended, or never was, is passed over."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            if name in self._groups:
                self._abort(self._groups[name].requests)

    def _abort(self, requests: list[Request]) -> None:
        """Stop and forget these; nothing if they have ended, even where another request has their id now."""
        name = requests[0].request_id
        group = self._groups.get(name)
        if group is not None and group.requests is requests:
            del self._groups[name]
            group.inbox.pop(name, None)
            for request in requests:
                self._engine.abort(request)
                self._engine.output_processor.forget(request)

    def _free_numbers(self) -> Iterator[int]:
        """Numbers for new requests; as ids, none of them is in use. A call that is refused uses none of them up."""
        return (number for number in count(self._next_number) if str(number) not in self._groups)

    def _add(self, requests: list[Request], inbox: Inbox, only_ends: bool) -> None:
        request_id = requests[0].request_id
        if request_id in self._groups:  # perhaps since the request was checked: a stream adds it at its first step
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request; choose another")
        self._groups[request_id] = _Group(requests, inbox, only_ends)
        for request in requests:
            self._engine.add_request(request)

    def _step(self) -> None:
        """One step of the engine; what changed goes to the inboxes of those who asked for it."""
        self._check_open()
        try:
            changed = self._engine.step()
        except KeyboardInterrupt:
            # Wherever it struck: what was in flight is dropped, the tokens that the host has are kept.
            self._groups = {name: group for name, group in self._groups.items() if not group.is_finished}
            self._engine.restart(
                request for group in self._groups.values() for request in group.requests if not request.is_finished
            )
            raise
        except Exception:
            self.close()  # device state is unknown now: refuse further use instead of giving wrong answers
            raise
        for request in changed:
            group = self._groups.get(request.request_id)
            if group is not None and (request.is_finished or not group.only_ends):
                group.inbox[request.request_id] = group.requests
                if request.is_finished and group.is_finished:
                    del self._groups[request.request_id]

    def _make_output(self, group: list[Request], kind: RequestOutputKind) -> RequestOutput:
        output = self._engine.output_processor.make_output(group, kind)
        for completion in output.outputs:
            if completion.hidden_states is not None:
                parts = completion.hidden_states
                completion.hidden_states = {layer: torch.cat(parts[layer]).float() for layer in parts}
        return output

    # -- about the engine --

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._known_tokenizer().hf

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """Call function(model) on each worker's model, to look inside; returns the results."""
        self._check_open()
        return self._engine.apply_model(function)

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
        return {**self._engine.get_metrics(), **start}

    def reset_prefix_cache(self) -> None:
        """Forget what earlier requests left in the KV cache."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Free the model and the KV cache. May be called twice; later calls to anything else raise RuntimeError."""
        if not self._is_closed:
            self._is_closed = True
            self._groups.clear()
            self._engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this LLM is closed (by close(), or because a step failed); make a new one")

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


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several -> several."""
    prompts = prompts if isinstance(prompts, (str, Mapping)) else list(prompts)
    return [prompts] if _is_one(prompts) else prompts


def _is_one(prompts: Any) -> bool:
    """Is this one prompt, and no list of them? A flat list of integers is one."""
    if isinstance(prompts, (str, Mapping)):
        return True
    # An array has __index__ too: only one without dimensions is a number.
    return bool(prompts) and all(hasattr(item, "__index__") and not getattr(item, "ndim", 0) for item in prompts)
