"""The sampler in slow NumPy, in float64: what the tests compare with."""

import numpy as np


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
