"""AsyncLiveWeights: `LiveWeights` for coroutines, by the names that vLLM's AsyncLLM has.

Owns nothing: each call is `LLM`'s, in a thread, since it may wait for the engine. Invariant: an event loop never waits.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.live.surface import Weights
    from nanovllm.llm import LLM


class AsyncLiveWeights:
    llm: "LLM"  # what `AsyncLLM` has

    async def update_weights(self, weights: "Weights | None" = None, *, mode: str = "keep") -> int:
        """As `LLM.update_weights`; `weights` is read in another thread."""
        return await asyncio.to_thread(self.llm.update_weights, weights, mode=mode)

    async def pause_generation(self, *, mode: str = "abort") -> None:
        """As `LLM.pause`; what is asked for meanwhile waits for `resume_generation`."""
        await asyncio.to_thread(self.llm.pause, mode)

    async def resume_generation(self) -> None:
        await asyncio.to_thread(self.llm.resume)

    async def is_paused(self) -> bool:
        return self.llm.is_paused

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """As `LLM.sleep`."""
        await asyncio.to_thread(self.llm.sleep, level, mode)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        await asyncio.to_thread(self.llm.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return self.llm.is_sleeping

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`."""
        return await asyncio.to_thread(self.llm.collective_rpc, method, timeout, args, kwargs)
