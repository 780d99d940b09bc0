"""VLLMSurface: what programs written for vLLM ask of an LLM object beside `generate`: given, or refused by name.

Owns no request and no engine; all of it stands on `LLM`'s own parts. Invariant: a method of vLLM that is not supported
is here and says so, so that nobody has to guess from an AttributeError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, Self, overload

from tqdm import tqdm

from nanovllm.adapters import AdaptedLLM, Adapters
from nanovllm.beam_search import BeamSearchParams, search_prompts
from nanovllm.build import StartTimes
from nanovllm.config import ResolvedConfig
from nanovllm.data_parallel import DataParallelEngine
from nanovllm.embedding import PARAMS as EMBED_PARAMS
from nanovllm.embedding import EmbeddingRequestOutput, Pooling, embed
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import InputProcessor, Prompt
from nanovllm.engine.prompt_text import PromptText
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.live.doors import executor_door
from nanovllm.live.surface import LiveWeights
from nanovllm.lora.request import LoRARequest
from nanovllm.model_config import ModelConfig
from nanovllm.outputs import BeamSearchOutput, RequestOutput, raise_error_of
from nanovllm.prompts import TokensPrompt, list_prompts
from nanovllm.sampling_params import SamplingParams
from nanovllm.scoring import score
from nanovllm.tokenizer import Tokenizer
from nanovllm.vllm_options import refuse_absent

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


@dataclass
class _Queue:
    """What `enqueue` has queued, and what of it is done."""

    inbox: Inbox[RequestOutput]
    handles: list[Handle] = field(default_factory=list)
    outputs: dict[Handle, RequestOutput] = field(default_factory=dict)


def _refused(name: str, reason: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"LLM.{name} is not supported: {reason}")

    refuse.__doc__ = f"Raises NotImplementedError: {reason}."
    return refuse


class VLLMSurface(LiveWeights, AdaptedLLM):
    # What `LLM` has.
    config: ResolvedConfig
    model_config: ModelConfig
    num_kv_cache_tokens: int
    generate: Callable[..., list[RequestOutput]]
    close: Callable[[], None]
    _hf_config: Mapping[str, Any]
    _generation_config: Mapping[str, Any]
    _start_times: StartTimes
    _engine: Engine | DataParallelEngine
    _session: Session
    _input_processor: InputProcessor
    _tokenizer: Tokenizer | None
    _process: Callable[..., list[list[Request]]]
    _make_output: Callable[[Sequence[Request]], RequestOutput]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list. lora_request: as in `generate`. options: of `preprocess_chat`,
        which makes prompts of them.
        """
        prompts = self.preprocess_chat(messages, **options)
        listed = prompts[0] if is_conversation(messages) else prompts
        return self.generate(listed, sampling_params, use_tqdm, lora_request)

    def preprocess_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **absent: Any,
    ) -> list[TokensPrompt]:
        """The prompts that conversations make, one or a list of them, by the model's chat template.

        tools: JSON schemas of functions that the template may tell the model of. chat_template: Jinja text in place of
        the model's own. continue_final_message: the answer goes on with the last message (add_generation_prompt=False
        then). chat_template_kwargs: what else the template reads. Raises ValueError or TypeError that names what is
        wrong.
        """
        refuse_absent("LLM.chat", absent)
        if isinstance(messages, (str, Mapping)):
            raise TypeError(f"messages must be a list of {{'role': ..., 'content': ...}}, got {messages!r}")
        tokenizer = self._known_tokenizer()
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template": chat_template,
            **(chat_template_kwargs or {}),
        }
        is_one = is_conversation(messages)
        prompts: list[TokensPrompt] = []
        reader = PromptText(tokenizer.encode, self.config.max_model_len)
        for i, conversation in enumerate([messages] if is_one else messages):
            name = "messages" if is_one else f"messages[{i}]"
            text = tokenizer.render_chat(conversation, name=name, **options)
            token_ids = reader.read(text, name, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return prompts

    # -- other questions than "what comes next" --

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        lora_request: LoRARequest | None = None,
    ) -> list[BeamSearchOutput]:
        """For each prompt the `beam_width` most likely continuations that a beam search finds, best first."""
        self._session.check_open()

        def generate(beams: list[list[int]], step: SamplingParams) -> list[RequestOutput]:
            results = self.generate(beams, step, use_tqdm=False, lora_request=lora_request)
            raise_error_of(results)
            return results

        about = self._input_processor, self._tokenizer, self.config.max_model_len
        return search_prompts(generate, *about, list_prompts(prompts)[0], params, use_tqdm)

    @overload
    def score(
        self, prefix: Prompt, options: Sequence[str | Sequence[int]], lora_request: LoRARequest | None = None
    ) -> list[float]: ...
    @overload
    def score(
        self, prefix: Prompt, options: Sequence[str | Sequence[int]], lora_request: Sequence[LoRARequest | None]
    ) -> list[list[float]]: ...
    def score(
        self, prefix: Prompt, options: Sequence[str | Sequence[int]], lora_request: Adapters = None
    ) -> list[float] | list[list[float]]:
        """Log-likelihood of each option given the prefix: the sum of its tokens' log-probabilities (natural log).

        An option is a string or token ids. Strings are tokenized by themselves, so begin them with the space that a
        prefix without one calls for. With prefix caching, which is on by default, the prefix is computed once.
        lora_request: the adapter to score with; of a list, such as [policy, None], a list for each, from one batch.
        """
        is_one = lora_request is None or isinstance(lora_request, LoRARequest)
        adapters: list[Any] = [lora_request] if is_one else list(lora_request)  # type: ignore[arg-type]

        def give(groups: Sequence[Sequence[Request]]) -> None:
            self._give_adapters(groups, [adapter for adapter in adapters for _ in options])

        scores = score(self._session, self._input_processor, prefix, options, len(adapters), give)
        return scores[0] if is_one else scores

    # -- queue now, run later --

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        **absent: Any,
    ) -> list[str]:
        """Queue prompts, to run beside whatever runs; returns their ids. `wait_for_completion` returns the outputs."""
        refuse_absent("LLM.generate", absent)
        queue = self._queue
        groups = self._process(list_prompts(prompts)[0], sampling_params, lora_request)
        handles = [Handle(group, queue.inbox, only_ends=True) for group in groups]
        try:
            for handle in handles:
                self._session.submit(handle)
        except BaseException:
            self._session.cancel(handles)
            raise
        queue.handles += handles
        return [handle.request_id for handle in handles]

    def wait_for_completion(self, use_tqdm: bool = True) -> list[RequestOutput]:
        """Outputs of all that `enqueue` has queued since the last call, in that order, when all are done."""
        queue = self._queue
        news = queue.inbox.news
        with tqdm(total=len(queue.handles), desc="Generating", unit=" prompts", disable=not use_tqdm) as progress:
            while len(queue.outputs) < len(queue.handles):
                self._session.wait(queue.inbox)
                for handle in list(news):
                    queue.outputs[handle] = news[handle][0]  # kept here before it is gone there: an interrupted call
                    del news[handle]  # may be made again
                    progress.update()
        outputs = [queue.outputs[handle] for handle in queue.handles]
        del self._queue
        return outputs

    @cached_property
    def _queue(self) -> "_Queue":
        return _Queue(Inbox(self._make_output))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        lora_request: Adapters = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, of the hidden states behind the last norm; see `embedding.Pooling`.

        pooling: "last", as for Qwen3-Embedding and most embedding models that are decoders, or "mean".
        """
        how = Pooling(kind=pooling, is_normalized=normalize, dimensions=dimensions)
        how.check(self.model_config.hidden_size)
        return embed(self._session, self._process(list_prompts(prompts)[0], EMBED_PARAMS, lora_request), how)

    # -- about the engine --

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        config = self.config
        return (
            f"LLM({config.model!r}, device={config.device!r}, dtype={config.dtype!r}, "
            f"quantization={self.quantization!r}, kv_cache_dtype={config.kv_cache_dtype!r}, "
            f"max_model_len={config.max_model_len}, num_kv_cache_tokens={self.num_kv_cache_tokens})"
        )

    @property
    def quantization(self) -> str | None:
        """How weights are kept: as the option says, or by the checkpoint's own method; None if they are dense."""
        stored = self.model_config.quantization
        return self.config.quantization or (None if stored is None else stored.get("quant_method"))

    @property
    def _is_closed(self) -> bool:
        return self._session.is_closed

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._known_tokenizer().hf

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

    def explain(self, request_id: str) -> str:
        """What happened to a request, in words: when it waited and for what, what was cached, when it ran.

        Raises ValueError where the engine writes no `trace`, or nothing of that id is in it yet.
        """
        if self.config.trace is None:
            raise ValueError("explain reads the trace: make the engine with trace='run.json.gz'")
        from nanovllm.tracing.explain import explain  # a room
        from nanovllm.tracing.traced_engine import traces_of

        self.get_metrics()  # then all that has ended is in the file
        return explain(traces_of(self.config), request_id)

    def reset_prefix_cache(self) -> None:
        """Forget what earlier requests left in the KV cache."""
        self._session.exclusively(self._engine.reset_prefix_cache)

    def _known_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer (skip_tokenizer_init=True); pass token ids")
        return self._tokenizer

    # -- what wrappers read --

    @cached_property
    def llm_engine(self) -> SimpleNamespace:
        """vLLM's engine object, as far as wrappers use it: `model_config`, `get_tokenizer()`, a way to load weights."""
        from transformers import AutoConfig, PretrainedConfig

        stated = dict(self._hf_config)
        try:
            hf_config = AutoConfig.for_model(stated.pop("model_type"), **stated)
        except (KeyError, ValueError):  # a type that transformers does not have
            hf_config = PretrainedConfig.from_dict(dict(self._hf_config))
        config = self.config
        model_config = SimpleNamespace(
            model=config.model,
            tokenizer=config.tokenizer or config.model,
            max_model_len=config.max_model_len,
            dtype=config.dtype,
            seed=config.seed,
            hf_config=hf_config,
            hf_text_config=hf_config.get_text_config(),
            get_vocab_size=lambda: self.model_config.vocab_size,
        )
        return SimpleNamespace(
            model_config=model_config, get_tokenizer=self.get_tokenizer, model_executor=executor_door(self)
        )

    # -- what is not here --

    _POOLING = "only embed() pools; `capture` in SamplingParams returns hidden states"
    encode = _refused("encode", _POOLING)
    classify = _refused("classify", _POOLING)
    reward = _refused("reward", _POOLING)
    start_profile = _refused("start_profile", "use torch.profiler, or get_metrics()")
    stop_profile = _refused("stop_profile", "use torch.profiler, or get_metrics()")


def is_conversation(messages: Sequence[Any]) -> bool:
    """Is this one conversation, and no list of them?"""
    return not len(messages) or isinstance(messages[0], Mapping)
