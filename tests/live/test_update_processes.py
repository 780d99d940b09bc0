"""New weights where the model runs in other processes: ranks, and replicas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.live.new_weights import PROMPTS, generate, make_llm, save_two, tensors_of

LONG = SamplingParams(temperature=0, max_tokens=100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(params=[{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=["ranks", "replicas"])
def llm(folders: list[Path], request: pytest.FixtureRequest) -> Iterator[LLM]:
    with make_llm(folders[0], **request.param) as llm:
        yield llm


def test_all_processes_have_the_new_weights_or_none(llm: LLM, folders: list[Path]) -> None:
    tensors = tensors_of(folders[1])
    with make_llm(folders[0]) as old, make_llm(folders[1]) as new:
        expected = [generate(old), generate(new)]
        long = [output.outputs[0].token_ids for output in old.generate(PROMPTS, LONG, use_tqdm=False)]
    assert generate(llm) == expected[0]
    with pytest.raises(ValueError, match="is no tensor of this model"):
        llm.update_weights([*tensors.items(), ("other", tensors["model.norm.weight"])])
    assert generate(llm) == expected[0]

    # In flight: recomputed under the new weights, from each one's first token of theirs on.
    stream = llm.stream(PROMPTS, LONG)
    parts: dict[str, list[Any]] = {}
    for _ in range(12):
        output = next(stream)
        parts.setdefault(output.request_id, []).append(output.outputs[0])
    assert llm.update_weights(tensors, mode="recompute") == 1
    for output in stream:
        parts.setdefault(output.request_id, []).append(output.outputs[0])
    for request_id, own in zip(sorted(parts, key=int), long, strict=True):
        versions = [version for part in parts[request_id] for version in part.weights_versions]
        token_ids = [token_id for part in parts[request_id] for token_id in part.token_ids]
        assert len(versions) == 100 and versions == sorted(versions)
        assert token_ids[: versions.count(0)] == own[: versions.count(0)]
    assert generate(llm) == expected[1], "also those prompts that the old weights left in the cache"

    # Held, restarted and ended.
    llm.pause("keep")
    llm.enqueue(PROMPTS, LONG)
    llm.update_weights(tensors_of(folders[0]))
    llm.resume()
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == long
    assert all(set(output.outputs[0].weights_versions) == {2} for output in outputs)
    llm.update_weights(tensors)
    llm.enqueue(PROMPTS, LONG)
    llm.step()
    llm.update_weights(tensors_of(folders[0]), mode="restart")
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == long
    assert all(set(output.outputs[0].weights_versions) == {4} for output in outputs)
    llm.enqueue(PROMPTS, LONG)
    llm.step()
    llm.pause("abort")
    assert {output.outputs[0].finish_reason for output in llm.wait_for_completion(use_tqdm=False)} == {"abort"}
    llm.resume()
    assert generate(llm) == expected[0]

    # Refused when all of it had been sent: nothing of it is written with the next one.
    llm.pause("keep")
    llm.enqueue(PROMPTS, LONG)
    with pytest.raises(RuntimeError, match="that a pause holds"):
        llm.update_weights(tensors, mode="wait")
    llm.resume()
    llm.wait_for_completion(use_tqdm=False)
    llm.update_weights({"model.norm.weight": tensors_of(folders[0])["model.norm.weight"]})
    assert generate(llm) == expected[0]
