"""AsyncLLM: every iterator gets what `LLM.generate` returns, however it is read, left, aborted or cut off."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nanovllm import (
    AsyncEngineArgs,
    AsyncLLM,
    AsyncLLMEngine,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from tests.llm_checks import check_nothing_is_left
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

PROMPTS = ["abc", "another one", "x", "y" * 40]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 16}
GUARD_SECONDS = 120


def sampled(kind: RequestOutputKind, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 1.5, "seed": 3, "max_tokens": 12, "ignore_eos": True, "output_kind": kind, **options}
    )


LONG = sampled(RequestOutputKind.DELTA, max_tokens=250)
ENDLESS = sampled(RequestOutputKind.DELTA, max_tokens=8000)  # minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(
        tmp_path_factory.mktemp("random"),
        vocab_size=VOCAB_WITH_TOKENIZER,
        eos_token_id=EOS,
        max_position_embeddings=8192,
    )
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(str(folder), **OPTIONS)
    yield engine
    asyncio.run(engine.close())


def run(main: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(main, GUARD_SECONDS)

    return asyncio.run(limited())


async def read(engine: AsyncLLM, prompt: Any, params: SamplingParams, name: str | None = None) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, name)]


async def until_idle(engine: AsyncLLM) -> None:
    while engine.llm.has_unfinished_requests():
        await asyncio.sleep(0.001)
    await asyncio.to_thread(check_nothing_is_left, engine.llm)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_outputs_of_each_kind_equal_those_of_generate(engine: AsyncLLM, kind: RequestOutputKind, n: int) -> None:
    params = sampled(kind, n=n)
    expected = engine.llm.generate(PROMPTS, params, use_tqdm=False)

    async def main() -> list[list[RequestOutput]]:
        outputs = await asyncio.gather(*(read(engine, prompt, params) for prompt in PROMPTS))
        await until_idle(engine)
        return outputs

    for outputs, whole in zip(run(main()), expected, strict=True):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert kind is not RequestOutputKind.FINAL_ONLY or len(outputs) == 1
        if kind is RequestOutputKind.DELTA:
            for completion in whole.outputs:
                pieces = [piece for output in outputs for piece in output.outputs if piece.index == completion.index]
                assert "".join(piece.text for piece in pieces) == completion.text
                assert [token_id for piece in pieces for token_id in piece.token_ids] == completion.token_ids
        else:
            assert outputs[-1].outputs == whole.outputs


async def by_break(outputs: AsyncIterator[RequestOutput]) -> None:
    async for _ in outputs:
        break


async def by_aclose(outputs: Any) -> None:
    async with aclosing(outputs):
        await anext(outputs)


async def by_exception(outputs: AsyncIterator[RequestOutput]) -> None:
    with pytest.raises(KeyError):
        async for _ in outputs:
            raise KeyError("of the user's own")


async def by_cancelling_the_task(outputs: AsyncIterator[RequestOutput]) -> None:
    has_begun = asyncio.Event()

    async def consume() -> None:
        async for _ in outputs:
            has_begun.set()

    task = asyncio.create_task(consume())
    await has_begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_cancelling_at_once(outputs: AsyncIterator[RequestOutput]) -> None:
    task = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_never_starting(outputs: AsyncIterator[RequestOutput]) -> None:
    pass


@pytest.mark.parametrize(
    "leave", [by_break, by_aclose, by_exception, by_cancelling_the_task, by_cancelling_at_once, by_never_starting]
)
def test_an_iterator_that_is_left_frees_its_blocks(engine: AsyncLLM, leave: Callable[[Any], Awaitable[None]]) -> None:
    params = sampled(RequestOutputKind.FINAL_ONLY)
    (expected,) = engine.llm.generate("other", params, use_tqdm=False)

    async def main() -> list[RequestOutput]:
        other = asyncio.create_task(read(engine, "other", params))
        before = engine.llm.get_metrics()["num_tokens_sampled"]
        await leave(engine.generate("abc", ENDLESS))
        outputs = await other
        await until_idle(engine)
        assert engine.llm.get_metrics()["num_tokens_sampled"] - before < 8000, "it was not stopped, it ran to its end"
        assert not engine._streams
        return outputs

    (output,) = run(main())
    assert output.outputs == expected.outputs


def test_abort_ends_the_iterator_with_its_reason(engine: AsyncLLM) -> None:
    async def main() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate("abc", ENDLESS, "mine"):
            outputs.append(output)
            if len(outputs) == 1:
                await engine.abort(["mine", "never was"])
        await until_idle(engine)
        return outputs

    outputs = run(main())
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
    assert outputs[-1].request_id == "mine"


def test_bad_input_raises_and_harms_nobody(engine: AsyncLLM) -> None:
    async def main() -> None:
        other = asyncio.create_task(read(engine, "abc", sampled(RequestOutputKind.DELTA)))
        with pytest.raises(ValueError, match="is empty"):
            await read(engine, "", LONG)
        async for _ in engine.generate("abc", ENDLESS, "mine"):
            with pytest.raises(ValueError, match="'mine' is in use"):
                await read(engine, "abc", LONG, "mine")
            break
        await other
        await until_idle(engine)

    run(main())


def test_a_slow_consumer_holds_nobody_up_and_gets_everything(engine: AsyncLLM) -> None:
    (expected,) = engine.llm.generate("abc", LONG, use_tqdm=False)

    async def main() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate("abc", LONG):
            outputs.append(output)
            if len(outputs) == 1:  # from here to the end of the request nobody reads
                while engine.llm.has_unfinished_requests():
                    await asyncio.sleep(0.001)
        return outputs

    outputs = run(main())
    assert len(outputs) <= 3, "what came while nobody read is one output"
    assert [token_id for output in outputs for token_id in output.outputs[0].token_ids] == expected.outputs[0].token_ids
    assert "".join(output.outputs[0].text for output in outputs) == expected.outputs[0].text


def test_several_loops_and_plain_threads_share_an_engine(engine: AsyncLLM) -> None:
    params = sampled(RequestOutputKind.CUMULATIVE)
    expected = [output.outputs[0].token_ids for output in engine.llm.generate(PROMPTS, params, use_tqdm=False)]
    results: list[Any] = [None] * 4

    async def main() -> list[list[int]]:
        found = await asyncio.gather(*(read(engine, prompt, params) for prompt in PROMPTS))
        return [outputs[-1].outputs[0].token_ids for outputs in found]

    def work(i: int) -> None:
        if i % 2:
            results[i] = run(main())
        else:
            found = engine.llm.generate(PROMPTS, params, use_tqdm=False)
            results[i] = [output.outputs[0].token_ids for output in found]

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_SECONDS)
    assert results == [expected] * 4


def test_closing_ends_every_iterator_with_an_error(folder: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(str(folder), **OPTIONS) as engine:
            tasks = [asyncio.create_task(read(engine, prompt, ENDLESS)) for prompt in PROMPTS]
            await anext(engine.generate("abc", ENDLESS))
        for task in tasks:
            with pytest.raises(RuntimeError, match="closed"):
                await task
        with pytest.raises(RuntimeError, match="closed"):
            await read(engine, "abc", ENDLESS)
        await engine.close()

    run(main())


def test_a_failing_step_reaches_every_iterator(folder: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    def break_it(model: Any) -> None:
        model.norm.register_forward_hook(fail)

    async def main() -> None:
        async with AsyncLLM(str(folder), **OPTIONS) as engine:
            tasks = [asyncio.create_task(read(engine, prompt, ENDLESS)) for prompt in PROMPTS]
            async for _ in engine.generate("abc", ENDLESS):
                await asyncio.to_thread(engine.llm.apply_model, break_it)
                break
            for task in tasks:
                with pytest.raises(RuntimeError, match=r"closed .*out of memory"):
                    await task

    run(main())


def test_an_engine_is_made_of_engine_args_as_with_vllm(engine: AsyncLLM, folder: Path) -> None:
    params = sampled(RequestOutputKind.FINAL_ONLY)
    other = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(folder), enable_lora=False, **OPTIONS))
    assert run(read(other, "abc", params))[-1].outputs == run(read(engine, "abc", params))[-1].outputs
    run(other.close())
    with pytest.raises(TypeError, match=r"engine_args must be AsyncEngineArgs, got \{'model': 'x'\}"):
        AsyncLLMEngine.from_engine_args({"model": "x"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'max_model_length'.*'max_model_len'"):
        AsyncEngineArgs(model="x", max_model_length=3)
