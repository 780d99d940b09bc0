"""Prompts that are dicts, far too long, or wrong, and options with tokens that are not there: what is said of them.

Owns messages, and the early end of a text that cannot fit. Invariant: an error names the item, and a text that cannot
fit is not tokenized as a whole.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovllm.errors import brief
from nanovllm.sampling_params import SamplingParams

PIECE = 65_536  # characters
_PER_CUT = 16  # tokens that a cut between two pieces may add, generously


def check_dict(prompt: Mapping[Any, Any], name: str) -> None:
    """Raise ValueError or TypeError for `name` if it is no TextPrompt or TokensPrompt; ids are not looked at."""
    unknown = set(prompt) - {"prompt", "prompt_token_ids"}
    if unknown or not prompt:
        raise ValueError(f"{name}: keys are 'prompt' or 'prompt_token_ids', got {sorted(map(str, prompt))}")
    if "prompt" in prompt and not isinstance(prompt["prompt"], str):
        raise TypeError(f"{name}['prompt'] must be a string, got {brief(prompt['prompt'])}")


def check_token_options(params: SamplingParams, vocab_size: int, name: str) -> None:
    """Raise ValueError for `name` if an option names a token that the model does not have."""
    for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token_id in getattr(params, field) or ():
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"{name}: {field} holds {token_id}, which is outside the vocabulary [0, {vocab_size})")


def token_id_error(token_ids: list[Any], vocab_size: int, name: str) -> Exception:
    """What is wrong with the first of them that is."""
    for index, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
            return TypeError(f"{name}[{index}] must be an integer token id, got {brief(token_id)}")
        token_id = token_id.__index__()
        if not 0 <= token_id < vocab_size:
            return ValueError(f"{name}[{index}] = {token_id} is outside the vocabulary [0, {vocab_size})")
    return TypeError(f"{name} must hold integer token ids, got {brief(token_ids)}")


def check_length(text: str, encode: Callable[..., list[int]], max_tokens: int, name: str) -> None:
    """Count tokens piece by piece, and raise ValueError for `name` where they are too many."""
    num_tokens = 0
    for start in range(0, len(text), PIECE):
        num_tokens += len(encode(text[start : start + PIECE], add_special_tokens=False)) - _PER_CUT
        if num_tokens > max_tokens:
            raise ValueError(
                f"{name} has {len(text):,} characters, of which the first {start + PIECE:,} are more than "
                f"{num_tokens:,} tokens, and max_model_len is {max_tokens}. Shorten the prompt, or raise "
                "max_model_len if the model allows it"
            )


def not_one_each(given: Any, name: str, kind: str, num_prompts: int) -> Exception:
    """What is wrong with what is no list of as many as there are prompts."""
    if not isinstance(given, Sequence):
        return TypeError(f"{name} must be {kind} or a list of them, got {given!r}")
    return ValueError(f"got {len(given)} {name} for {num_prompts} prompts; give one for all or one each")


def no_room(num_prompt: int, num_cache_tokens: int, name: str) -> ValueError:
    return ValueError(
        f"{name} needs room for {num_prompt + 1} tokens and the whole KV cache has {num_cache_tokens}. "
        "Shorten the prompt, or raise kv_cache_memory_bytes, gpu_memory_utilization or num_gpu_blocks_override"
    )


def too_long(num_prompt: int, max_model_len: int, name: str) -> ValueError:
    return ValueError(
        f"{name} has {num_prompt} tokens; with one output token it needs {num_prompt + 1}, and max_model_len "
        f"is {max_model_len}. Shorten the prompt, or raise max_model_len if the model allows it"
    )
