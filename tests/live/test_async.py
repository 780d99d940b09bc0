"""Weights, pause and sleep from coroutines: streams that are open go on, wait, or end."""

import asyncio
from pathlib import Path
from typing import Any

from nanovllm import SamplingParams
from nanovllm.async_llm import AsyncLLM
from tests.live.new_weights import OPTIONS, PROMPTS, make_llm, save_two, tensors_of

LONG = SamplingParams(temperature=0, max_tokens=60)


async def last(engine: AsyncLLM, prompt: list[int], started: asyncio.Event) -> Any:
    outputs = []
    async for output in engine.generate(prompt, LONG):
        outputs.append(output)
        started.set()
    return outputs[-1].outputs[0]


async def in_the_middle(engine: AsyncLLM, what: Any) -> list[Any]:
    """The last outputs of all prompts, with `what` awaited once one of them has brought something."""
    started = asyncio.Event()
    tasks = [asyncio.create_task(last(engine, prompt, started)) for prompt in PROMPTS]
    await started.wait()
    await what()
    return list(await asyncio.gather(*tasks))


def test_open_streams_go_on_wait_or_end(tmp_path: Path) -> None:
    old, new = save_two(tmp_path)
    with make_llm(old) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG, use_tqdm=False)]

    async def run() -> None:
        async with AsyncLLM(str(old), **OPTIONS) as engine:

            async def hold() -> None:
                await engine.pause_generation(mode="keep")
                assert await engine.is_paused()
                await engine.collective_rpc("reset_prefix_cache")
                await engine.resume_generation()

            assert [output.token_ids for output in await in_the_middle(engine, hold)] == alone

            async def doze() -> None:
                await engine.sleep(1, mode="keep")
                assert await engine.is_sleeping()
                await engine.wake_up()

            assert [output.token_ids for output in await in_the_middle(engine, doze)] == alone

            async def renew() -> None:
                assert await engine.update_weights(tensors_of(new), mode="recompute") == 1

            for output in await in_the_middle(engine, renew):
                assert output.weights_versions == sorted(output.weights_versions) and len(output.token_ids) == 60

            ended = await in_the_middle(engine, engine.pause_generation)
            assert {output.finish_reason for output in ended} <= {"abort", "length"}

    asyncio.run(run())
