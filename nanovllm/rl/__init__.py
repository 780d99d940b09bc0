"""Rollouts for training libraries: an engine where each of them expects one. See docs/training.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.rl.consistency import Mismatch, compare_logprobs
    from nanovllm.rl.trl import Rollout, rollout_func

__all__ = ["Mismatch", "Rollout", "compare_logprobs", "rollout_func"]

_HOMES = {"Mismatch": "consistency", "compare_logprobs": "consistency", "Rollout": "trl", "rollout_func": "trl"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"nanovllm.rl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
