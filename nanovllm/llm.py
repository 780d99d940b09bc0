"""LLM: the whole engine behind one object, with vLLM's offline interface.

Owns the user's view: prompts in, RequestOutputs out in order, progress, and the end of the engine's life; requests run
in a `Session`, so any thread may call anything. Invariant: a call that raises for bad input has queued nothing; a call
that is interrupted leaves nothing of its own behind.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from nanovllm.adapters import Adapters
from nanovllm.build import build_engine
from nanovllm.config import EngineConfig
from nanovllm.embedding import join_hidden_states
from nanovllm.engine.features.prompt_forms import not_one_each
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.output_processor import Marks
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.outputs import RequestOutput, raise_error_of
from nanovllm.progress import show_progress
from nanovllm.prompts import list_prompts
from nanovllm.sampling_params import SamplingParams
from nanovllm.stepping import SteppedLLM, SteppedRequests
from nanovllm.vllm_options import refuse_absent
from nanovllm.vllm_surface import VLLMSurface

Prompts = Prompt | Sequence[Prompt]  # one, or a list of them
Params = SamplingParams | Sequence[SamplingParams] | None  # for all of these prompts, or one for each


class LLM(SteppedLLM, VLLMSurface):
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
        prompts: Prompts,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        **absent: Any,
    ) -> list[RequestOutput]:
        """Complete each prompt; the results come in the order of the prompts.

        prompts: one or a list of strings, token-id lists, or {"prompt_token_ids": [...]}. sampling_params: one for all,
        or one for each; None takes `get_default_sampling_params()`. lora_request: the adapter that all are computed
        with, or one or None for each. absent: vLLM's arguments that are not here, which may say that they are off.
        Raises ValueError or TypeError that names the item at fault before anything is queued. A request that fails
        later, say in a Python logits processor, ends with finish_reason "error" and its reason, and the others go on;
        where `prompts` is one prompt, that is RequestError.
        """
        if absent:
            refuse_absent("LLM.generate", absent)
        listed, is_one = list_prompts(prompts)
        inbox = Inbox(self._make_output)
        groups = self._process(listed, sampling_params, lora_request)
        handles = [Handle(group, inbox, only_ends=True) for group in groups]
        news = self._session.run(handles, inbox)
        outputs = dict(show_progress(news, len(handles)) if use_tqdm else news)
        results = [outputs[handle] for handle in handles]
        if is_one:
            raise_error_of(results)
        return results

    def stream(
        self, prompts: Prompts, sampling_params: Params = None, lora_request: Adapters = None
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yield what is new as it comes: a request's outputs are deltas that add up to the whole.

        Yields no order across prompts; `request_id` rises with the prompts' order, and an output holds those of its
        `n` sequences that have news. Bad input raises here, at the call. Leaving the loop early, closing the iterator,
        or an exception cancels what is unfinished and frees its blocks. Several streams, `generate` and `step` may
        take turns: each sees its own requests only.
        """
        listed, is_one = list_prompts(prompts)
        inbox = Inbox(self._output_processor.mark)
        groups = self._process(listed, sampling_params, lora_request)
        handles = [Handle(group, inbox, only_ends=False) for group in groups]
        return self._stream(handles, inbox, is_one)

    def _stream(self, handles: list[Handle], inbox: Inbox[Marks], is_one: bool) -> Iterator[RequestOutput]:
        seen: dict[Handle, Marks] = {}
        for handle, marks in self._session.run(handles, inbox):
            new = self._make_output(handle.requests, marks, seen.get(handle, ()))
            seen[handle] = marks
            if new.outputs:
                yield new
            if is_one:
                raise_error_of([new])

    def _process(
        self, prompts: Sequence[Any], sampling_params: Params, lora_request: Adapters = None
    ) -> list[list[Request]]:
        """The sequences of each prompt, checked and not queued."""
        self._session.check_open()
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or len(sampling_params) != len(prompts):
            raise not_one_each(sampling_params, "sampling_params", "SamplingParams", len(prompts))
        with self._session.numbers(len(prompts)) as numbers:
            groups = [
                self._input_processor.process(prompt, params, f"prompts[{i}]", number)
                for i, (prompt, params, number) in enumerate(zip(prompts, sampling_params, numbers, strict=True))
            ]
        if lora_request is not None:
            self._give_adapters(groups, lora_request)
        return groups

    def _make_output(
        self, group: Sequence[Request], marks: Marks | None = None, since: Marks | None = None
    ) -> RequestOutput:
        output = self._output_processor.make_output(group, marks, since)
        return output if group[0].params.capture is None else join_hidden_states(output)

    def close(self) -> None:
        """Free the model and the KV cache. May be called twice; later calls to anything else raise RuntimeError."""
        self._session.close()
