"""Sleep: what may be asked for when, what is there afterwards, and the memory that is given back."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.live.new_weights import GREEDY, PROMPTS, generate, make_llm, save_two, tensors_of

LONG = SamplingParams(temperature=0, max_tokens=40)


def assert_refused(llm: LLM, match: str) -> None:
    for ask in (
        lambda: llm.generate(PROMPTS, GREEDY, use_tqdm=False),
        lambda: llm.stream(PROMPTS, GREEDY),
        lambda: llm.add_request(PROMPTS[0], GREEDY),
        lambda: llm.score(PROMPTS[0], [[1], [2]]),
    ):
        with pytest.raises(RuntimeError, match=match):
            ask()


def test_a_light_sleep_keeps_the_weights(llm: LLM, expected: list[Any]) -> None:
    assert generate(llm) == expected[0]
    llm.sleep()
    assert llm.is_sleeping
    assert_refused(llm, r"the engine sleeps, and its weights with it: wake_up\(\) first")
    with pytest.raises(RuntimeError, match="wake_up"):
        llm.update_weights([])
    llm.wake_up()
    assert not llm.is_sleeping
    before = llm.get_metrics()["num_prompt_tokens_cached"]
    assert generate(llm) == expected[0]
    assert llm.get_metrics()["num_prompt_tokens_cached"] == before, "the KV cache is empty"


def test_a_cache_that_woke_alone_goes_back_to_sleep(llm: LLM, expected: list[Any]) -> None:
    (sleeper,) = llm.apply_model(lambda model: model.sleeper)
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up(["kv_cache"])
        sleeper._caches[0].fill_(1)
        if level == 1:
            with pytest.raises(RuntimeError, match="sleeps already, at level 1"):
                llm.sleep(2)
        llm.sleep(level)
        assert not sleeper._caches[0].any(), "its pages were given back"
        llm.wake_up()
        assert generate(llm) == expected[0]


def test_a_deep_sleep_asks_for_all_weights_again(llm: LLM, folders: list[Path], expected: list[Any]) -> None:
    tensors = list(tensors_of(folders[1]).items())
    llm.update_weights(tensors_of(folders[0]))
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    assert llm.is_sleeping
    for number, named in enumerate(tensors):
        assert_refused(llm, rf"^{len(tensors) - number} tensors of the model have no value, 'model|'lm_head")
        llm.update_weights([named])
    llm.wake_up(tags=["kv_cache"])
    assert generate(llm) == expected[1]
    assert llm.weights_version == 1 + len(tensors)


def test_weights_that_were_never_updated_are_read_again(llm: LLM, expected: list[Any]) -> None:
    llm.sleep(level=2)
    llm.sleep(level=2)
    llm.wake_up(["weights"])
    assert generate(llm) == expected[0], "the KV cache is woken too"
    assert llm.weights_version == 0 and not llm.is_sleeping


@pytest.mark.parametrize("mode", ["keep", "abort", "restart", "wait"])
def test_requests_in_flight_sleep_with_the_engine(llm: LLM, mode: str) -> None:
    alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG, use_tqdm=False)]
    llm.enqueue(PROMPTS, LONG)
    for _ in range(6):
        llm.step()
    llm.sleep(mode=mode)
    assert not llm.step() and llm.has_unfinished_requests() is (mode in ("keep", "restart"))
    llm.wake_up()
    outputs = [output.outputs[0].token_ids for output in llm.wait_for_completion(use_tqdm=False)]
    if mode == "abort":
        assert all(own[: len(cut)] == cut and len(cut) < 40 for cut, own in zip(outputs, alone, strict=True))
    else:
        assert outputs == alone


def test_a_pause_outlives_a_sleep(llm: LLM, expected: list[Any]) -> None:
    llm.pause()
    llm.sleep()
    llm.wake_up()
    assert llm.is_paused
    llm.enqueue(PROMPTS, GREEDY)
    assert llm.step() == []
    llm.resume()
    assert [one.outputs[0].token_ids for one in llm.wait_for_completion(use_tqdm=False)] == expected[0].token_ids


@pytest.mark.parametrize(("level", "tags"), [(0, None), (3, None), (True, None), (1, "weights"), (1, ["kv"])])
def test_levels_and_tags_are_checked(llm: LLM, level: int, tags: Any) -> None:
    with pytest.raises(ValueError, match=r"(level|tags) must be"):
        llm.wake_up(tags) if tags else llm.sleep(level)
    assert not llm.is_sleeping


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_given_back_and_does_not_grow(tmp_path: Path) -> None:
    (folder, _) = save_two(tmp_path, hidden_size=256, vocab_size=40_000, num_attention_heads=4, intermediate_size=512)
    weights = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    with make_llm(folder, num_gpu_blocks_override=2000, max_num_seqs=4) as llm:
        generate(llm)
        awake = resident_bytes()
        llm.sleep(level=2)
        assert awake - resident_bytes() > 0.8 * weights
        llm.wake_up()
        assert awake - resident_bytes() > 0.8 * weights, "pages come when they are written"
        expected = generate(llm)
        sizes = []
        for _ in range(50):
            llm.sleep(level=2)
            llm.wake_up()
            sizes.append(resident_bytes())
        assert generate(llm) == expected
        assert max(sizes[25:]) < max(sizes[:25]) + 0.1 * weights


def test_a_sleep_that_is_refused_leaves_the_engine_awake(llm: LLM, expected: list[Any]) -> None:
    llm.pause("keep")
    llm.enqueue(PROMPTS, LONG)
    with pytest.raises(RuntimeError, match="that a pause holds"):
        llm.sleep(level=2, mode="wait")
    assert not llm.is_sleeping
    llm.resume()
    assert {output.outputs[0].finish_reason for output in llm.wait_for_completion(use_tqdm=False)} == {"length"}
    assert generate(llm) == expected[0]
