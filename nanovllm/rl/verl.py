"""A rollout class for verl: an engine in the process of verl's worker, which verl gives weights and asks for sequences.

    from nanovllm.rl.verl import register
    register()                             # then `actor_rollout_ref.rollout.name: nanovllm` in verl's config

Read at verl 0.9.1. Owns the translation between verl's batches and requests. Invariant: `update_weights` and `release`
mean what `LLM.update_weights` and `sleep` mean, so nothing is generated with weights of which a part is missing. What
verl puts around a server of its own (agent loops over Ray actors, `RolloutReplica`) is not here.
"""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from verl import DataProto
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout

from nanovllm.llm import LLM
from nanovllm.rl.consistency import own_logprobs
from nanovllm.sampling_params import SamplingParams

NAME = "nanovllm"


def register() -> None:
    """Let verl find `NanoRollout` by its name."""
    _ROLLOUT_REGISTRY[NAME, "async"] = f"{NanoRollout.__module__}.{NanoRollout.__name__}"


class NanoRollout(BaseRollout):  # type: ignore[misc]
    """config, model_config: verl's. engine_kwargs under the name "nanovllm" are options of `LLM`, and win."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, model_config, device_mesh, *args, **kwargs)
        rollout = self.config
        if rollout.tensor_model_parallel_size > 1:
            raise NotImplementedError(
                f"tensor_model_parallel_size={rollout.tensor_model_parallel_size} is not supported by this rollout: "
                "each of verl's workers has an engine on its own device; use 1"
            )
        options: dict[str, Any] = {
            "dtype": rollout.dtype,
            "seed": rollout.seed,
            "max_model_len": rollout.max_model_len or rollout.prompt_length + rollout.response_length,
            "max_num_seqs": rollout.max_num_seqs,
            "max_num_batched_tokens": max(rollout.max_num_batched_tokens, rollout.max_num_seqs),
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "enforce_eager": rollout.enforce_eager,
            "enable_sleep_mode": rollout.free_cache_engine,
            "deterministic": rollout.full_determinism,
            "logprobs_mode": rollout.logprobs_mode or "raw_logprobs",
            "skip_tokenizer_init": True,
        }
        own = dict(rollout.engine_kwargs.get(NAME) or {})
        self.llm = LLM(self.model_config.local_path or self.model_config.path, **{**options, **own})

    # -- memory and weights --

    async def resume(self, tags: list[str]) -> None:
        self.llm.wake_up(tags)

    async def release(self) -> None:
        self.llm.sleep(level=2)

    async def update_weights(
        self, weights: Generator[tuple[str, Tensor], None, None], wire_format: str = "named_tensors", **kwargs: Any
    ) -> None:
        """All tensors in one version; verl may lend the same memory for several of them, so each is copied."""
        if wire_format != "named_tensors":
            raise NotImplementedError(f"wire_format={wire_format!r} is not supported; use 'named_tensors'")
        self.llm.update_weights((name, tensor.detach().clone()) for name, tensor in weights)

    # -- sequences --

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """verl's batch, prompts padded on the left, with responses padded on the right behind them."""
        from tensordict import TensorDict

        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        about, length = prompts.meta_info, self.config.response_length
        pad = about.get("pad_token_id", 0)
        params = self._params(about)
        token_ids = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        outputs = self.llm.generate(token_ids, params, use_tqdm=False)
        completions = [one for output in outputs for one in output.outputs]
        responses = _padded([one.token_ids for one in completions], length, pad)
        response_mask = _padded([[1] * len(one.token_ids) for one in completions], length, 0)
        ids, mask = (tensor.repeat_interleave(params.n, dim=0) for tensor in (ids, mask))
        attention_mask = torch.cat((mask, response_mask.to(mask.dtype)), dim=1)
        batch = {
            "prompts": ids,
            "responses": responses,
            "input_ids": torch.cat((ids, responses), dim=1),
            "rollout_log_probs": _padded(
                [own_logprobs(one.token_ids, one.logprobs) for one in completions], length, -1.0
            ),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        }
        return DataProto(batch=TensorDict(batch, batch_size=len(completions)), meta_info=about)

    def _params(self, about: dict[str, Any]) -> SamplingParams:
        """about: meta_info of a batch, which may say other than the config."""
        config, is_validation = self.config, about.get("validate", False)
        source = config.val_kwargs if is_validation else config
        does_sample = about.get("do_sample", source.do_sample)
        eos = about.get("eos_token_id", ())
        return SamplingParams(
            n=1 if is_validation or not does_sample else config.n,
            temperature=about.get("temperature", source.temperature) if does_sample else 0.0,
            top_p=about.get("top_p", source.top_p),
            top_k=max(0, about.get("top_k", source.top_k)),
            repetition_penalty=config.repetition_penalty,
            max_tokens=about.get("response_length", config.response_length),
            ignore_eos=config.ignore_eos,
            stop_token_ids=[] if config.ignore_eos else [eos] if isinstance(eos, int) else list(eos),
            logprobs=0,
            detokenize=False,
        )


def _padded(rows: Sequence[Sequence[float]], length: int, pad: float) -> Tensor:
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
