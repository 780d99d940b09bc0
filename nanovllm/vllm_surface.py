"""VLLMSurface: what programs written for vLLM ask of an LLM object beside `generate`: given, or refused by name.

Owns no request and no engine; all of it stands on `LLM`'s own parts. Invariant: a method of vLLM that is not supported
is here and says so, so that nobody has to guess from an AttributeError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from nanovllm.config import ModelConfig, ResolvedConfig
from nanovllm.embedding import PARAMS as EMBED_PARAMS
from nanovllm.embedding import EmbeddingRequestOutput, Pooling, embed
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.prompt_text import PromptText
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import TokensPrompt
from nanovllm.sampling_params import SamplingParams
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


class VLLMSurface:
    # What `LLM` has.
    config: ResolvedConfig
    model_config: ModelConfig
    _hf_config: Mapping[str, Any]
    _session: Session
    _process: Callable[..., list[list[Request]]]
    _make_output: Callable[[Sequence[Request]], RequestOutput]
    _known_tokenizer: Callable[[], Any]
    get_tokenizer: Callable[[], Any]

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

    # -- queue now, run later --

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **absent: Any,
    ) -> list[str]:
        """Queue prompts, to run beside whatever runs; returns their ids. `wait_for_completion` returns the outputs."""
        refuse_absent("LLM.generate", absent)
        queue = self._queue
        handles = [Handle(group, queue.inbox, only_ends=True) for group in self._process(prompts, sampling_params)]
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
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, of the hidden states behind the last norm; see `embedding.Pooling`.

        pooling: "last", as for Qwen3-Embedding and most embedding models that are decoders, or "mean".
        """
        how = Pooling(kind=pooling, is_normalized=normalize, dimensions=dimensions)
        how.check(self.model_config.hidden_size)
        return embed(self._session, self._process(prompts, EMBED_PARAMS), how)

    # -- what wrappers read --

    @cached_property
    def llm_engine(self) -> SimpleNamespace:
        """vLLM's engine object, as far as wrappers read it: `model_config` and `get_tokenizer()`."""
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
        return SimpleNamespace(model_config=model_config, get_tokenizer=self.get_tokenizer)

    # -- what is not here --

    _POOLING = "only embed() pools; `capture` in SamplingParams returns hidden states"
    encode = _refused("encode", _POOLING)
    classify = _refused("classify", _POOLING)
    reward = _refused("reward", _POOLING)
    sleep = _refused("sleep", "close() frees the device")
    wake_up = _refused("wake_up", "nothing sleeps")
    collective_rpc = _refused("collective_rpc", "apply_model(function) reaches each worker's model")
    start_profile = _refused("start_profile", "use torch.profiler, or get_metrics()")
    stop_profile = _refused("stop_profile", "use torch.profiler, or get_metrics()")


def is_conversation(messages: Sequence[Any]) -> bool:
    """Is this one conversation, and no list of them?"""
    return not len(messages) or isinstance(messages[0], Mapping)
