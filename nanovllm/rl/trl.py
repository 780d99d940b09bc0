"""A `rollout_func` for TRL's GRPOTrainer: completions from an engine on the trainer's own parameters.

    GRPOTrainer(model=..., rollout_func=rollout_func, ...)               # or Rollout(deterministic=True, ...)

Read at TRL 1.16.0. TRL calls it with the prompts of this process, each as often as there are to be completions of it.
Owns the engine, which is built at the first call, since the trainer has its model by then, and told of each optimizer
step. Invariant: log-probabilities are those of the distribution that the tokens were drawn from, as TRL computes them
from its own logits.
"""

from collections.abc import Sequence
from typing import Any

from nanovllm.llm import LLM
from nanovllm.rl.consistency import own_logprobs
from nanovllm.sampling_params import SamplingParams

_DEFAULT_MEMORY = 0.3  # of a GPU, beside a trainer; as TRL's own default for vLLM


class Rollout:
    """options: of `LLM`; the model is the trainer's, and so are limits of memory and length that its config has."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._llm: LLM | None = None
        self._step: int | None = None  # of the trainer, whose weights the engine has

    @property
    def llm(self) -> LLM:
        """The engine, once there has been a rollout."""
        if self._llm is None:
            raise RuntimeError("the engine is built at the first rollout, of the trainer's model")
        return self._llm

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's RolloutFunc: a completion for each prompt, with the log-probability of each of its tokens."""
        llm = self._current(trainer)
        prompt_ids = [_token_ids(prompt, trainer) for prompt in prompts]
        outputs = llm.generate(prompt_ids, _params(trainer), use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(one.token_ids) for one in completions],
            "logprobs": [own_logprobs(one.token_ids, one.logprobs) for one in completions],
        }

    def _current(self, trainer: Any) -> LLM:
        """The engine, with the weights that the trainer has now."""
        step = trainer.state.global_step
        if self._llm is None:
            self._llm = self._build(trainer)
        elif step != self._step:
            self._llm.update_weights()
        self._step = step
        return self._llm

    def _build(self, trainer: Any) -> LLM:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "merge_adapter"):
            raise NotImplementedError(
                "the trainer's model has a PEFT adapter, which an engine on its parameters does not see; train without "
                "peft_config"
            )
        args = trainer.args
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "seed": args.seed + trainer.accelerator.process_index,
        }
        if model.device.type == "cuda":
            options["gpu_memory_utilization"] = getattr(args, "vllm_gpu_memory_utilization", None) or _DEFAULT_MEMORY
        if getattr(args, "vllm_max_model_length", None) is not None:
            options["max_model_len"] = args.vllm_max_model_length
        return LLM(model, **{**options, **self._options})


def rollout_func(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
    """`Rollout()` of this trainer, for GRPOTrainer(rollout_func=...)."""
    rollout: Rollout = vars(trainer).setdefault("_nanovllm_rollout", Rollout())
    return rollout(prompts, trainer)


def _params(trainer: Any) -> SamplingParams:
    """What the trainer's config says about sampling, and EOS as its tokenizer has it."""
    args = trainer.args
    options: dict[str, Any] = {
        "max_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k or 0,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "logprobs": 0,
        "detokenize": False,
        "stop_token_ids": [trainer.processing_class.eos_token_id],
    }
    return SamplingParams(**{**options, **(args.generation_kwargs or {})})


def _token_ids(prompt: Any, trainer: Any) -> list[int]:
    """A text, or a conversation, as the trainer's tokenizer reads it."""
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    options = {**(trainer.args.chat_template_kwargs or {}), "tokenize": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options))
