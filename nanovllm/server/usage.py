"""What OpenAI's answers say of tokens: usage, and log-probabilities in the two forms of its routes."""

from collections.abc import Sequence
from typing import Any

from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

LOWEST = -9999.0  # what OpenAI's API has for a probability of nothing: JSON knows no infinity


def usage_of(outputs: Sequence[RequestOutput], num_generated: int) -> dict[str, Any]:
    """outputs: the last of each prompt."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def num_generated(output: RequestOutput) -> int:
    return sum(len(completion.token_ids) for completion in output.outputs)


def chat_logprobs(completion: CompletionOutput, num_top: int) -> dict[str, Any] | None:
    """As chat completions have them: each token with the `num_top` most likely ones."""
    if completion.logprobs is None:
        return None
    content = []
    for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        top = [_entry(entry) for entry in _most_likely(entries, num_top)]
        content.append({**_entry(entries[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": max(entry.logprob, LOWEST), "bytes": list(text.encode(errors="replace"))}


def _most_likely(entries: Any, num_top: int) -> list[Logprob]:
    return sorted(entries.values(), key=lambda entry: -entry.logprob)[:num_top]


def completion_logprobs(
    token_ids: Sequence[int], entries_of: Sequence[Any], num_top: int, offset: int = 0
) -> dict[str, Any]:
    """As completions have them. entries_of: per token, None for a prompt's first. offset: characters before them."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entries in zip(token_ids, entries_of, strict=True):
        entry = None if entries is None else entries[token_id]
        tokens.append("" if entry is None else entry.decoded_token or "")
        logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
        tops.append(
            None
            if entries is None
            else {top.decoded_token or "": max(top.logprob, LOWEST) for top in _most_likely(entries, num_top)}
        )
        offsets.append(offset)
        offset += len(tokens[-1])
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
