"""The sampler in slow NumPy, in float64: what the tests compare with."""

import numpy as np
import torch

from nanovllm.sampling_params import SamplingParams


def keep_min_p(logits: np.ndarray, min_p: float) -> np.ndarray:
    return np.exp(logits - logits.max()) >= min_p


def keep_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    if not 0 < top_k < len(logits):
        return np.ones(len(logits), dtype=bool)
    return logits >= np.sort(logits)[-top_k]


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    if top_p >= 1:
        return np.ones(len(logits), dtype=bool)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits[order] - logits.max())
    keep = np.zeros(len(logits), dtype=bool)
    reached = 0.0
    for token, weight in zip(order, weights, strict=True):
        keep[token] = True
        reached += weight
        if reached >= top_p * weights.sum():
            break
    return keep


def edited(
    logits: np.ndarray,
    prompt: list[int],
    output: list[int],
    params: SamplingParams,
    *,
    stop_ids: tuple[int, ...] = (),
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> np.ndarray:
    """The stages before temperature, one token at a time."""
    result = logits.astype(np.float64).copy()
    for token in range(len(result)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result[token] = -np.inf
        for word in bad_words:
            begin = len(output) - len(word) + 1
            if word[-1] == token and begin >= 0 and output[begin:] == list(word[:-1]):
                result[token] = -np.inf
        if token in stop_ids and len(output) < params.min_tokens:
            result[token] = -np.inf
        result[token] += (params.logit_bias or {}).get(token, 0.0)
    for processor in params.logits_processors or ():
        result = processor(prompt + output, torch.from_numpy(result.astype(np.float32))).numpy().astype(np.float64)
    for token in range(len(result)):
        if token in prompt + output:
            repetition = params.repetition_penalty
            result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
        result[token] -= params.frequency_penalty * output.count(token)
        result[token] -= params.presence_penalty * (token in output)
    return result


def filtered_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, slack: float = 0.0
) -> np.ndarray:
    """Probabilities after all stages; slack scales min_p and top_p a little, to tell a choice too close to call."""
    scaled = (logits.astype(np.float32) / np.float32(temperature)).astype(np.float64)
    scaled = np.where(keep_min_p(scaled, min(1.0, float(np.float32(min_p)) * (1 - slack))), scaled, -np.inf)
    scaled = np.where(keep_top_k(scaled, top_k), scaled, -np.inf)
    scaled = np.where(keep_top_p(scaled, float(np.float32(top_p)) * (1 + slack) if top_p < 1 else 1.0), scaled, -np.inf)
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()
