"""Where training libraries reach into vLLM's engine, and what they find there: a worker, and a model to load.

Owns these names. Invariant: whatever they change goes the way of `LLM.update_weights`; a name that is not here says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from nanovllm.live.surface import LiveWeights

_METHODS = ("pause", "reset_prefix_cache", "resume", "sleep", "update_weights", "wake_up")  # of `LLM`, for any worker


class ModelDoor:
    """llm.llm_engine.model_executor.driver_worker.model_runner.model, as TRL has it."""

    def __init__(self, llm: "LiveWeights") -> None:
        self._llm = llm

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._llm.update_weights(weights)


def executor_door(llm: "LiveWeights") -> SimpleNamespace:
    """vLLM's `model_executor`."""
    model_runner = SimpleNamespace(model=ModelDoor(llm))
    return SimpleNamespace(driver_worker=SimpleNamespace(model_runner=model_runner))


@dataclass(frozen=True)
class OnWorker:
    """A function of a vLLM worker, called with what of one there is: its device, and its runner with the model."""

    function: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, runner: Any) -> Any:
        worker = SimpleNamespace(model_runner=runner, device=runner.device, get_model=lambda: runner.model)
        return self.function(worker, *self.args, **self.kwargs)


def call_method(llm: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What the workers would return for a method that vLLM's worker has by this name."""
    if name not in _METHODS:
        raise NotImplementedError(
            f"collective_rpc({name!r}) is not supported: there are {', '.join(_METHODS)}; give a function of a worker"
        )
    return [getattr(llm, name)(*args, **kwargs)]
