"""New weights under an engine that runs: what it computes then, what becomes of requests in flight, and of failures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.live import update
from tests.live.new_weights import GREEDY, PROMPTS, generate, make_llm, save_two, tensors_of
from tests.quantization.checkpoints import save_quantized
from tests.quantization.formats import FORMATS
from tests.tiny_models import edit_json

LONG = SamplingParams(temperature=0, max_tokens=40)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "tie_word_embeddings": False}),
        ("Qwen3MoeForCausalLM", {}),
        ("GlmForCausalLM", {"attention_bias": True}),
        ("Olmo2ForCausalLM", {}),
        ("Lfm2MoeForCausalLM", {}),
    ],
)
def test_an_updated_engine_is_as_a_new_one(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    old, new = save_two(tmp_path, architecture, **options)
    with make_llm(old) as llm, make_llm(new) as fresh:
        before, expected = generate(llm), generate(fresh)
        assert before != expected
        assert generate(llm) == before, "now every prompt is cached"
        assert llm.update_weights(tensors_of(new)) == 1
        assert generate(llm) == expected
        assert llm.update_weights(reversed(tensors_of(old).items())) == 2
        assert generate(llm) == before


def test_tensors_may_come_one_by_one(llm: LLM, folders: list[Path], expected: list[Any]) -> None:
    generate(llm)
    for number, named in enumerate(tensors_of(folders[1]).items(), 1):
        assert llm.update_weights([named]) == number
    assert generate(llm) == expected[1]


def test_nothing_changes_before_an_update_is_finished(llm: LLM, folders: list[Path], expected: list[Any]) -> None:
    llm.start_weight_update()
    with pytest.raises(RuntimeError, match="finish_weight_update"):
        llm.start_weight_update()
    for named in tensors_of(folders[1]).items():
        assert llm.update_weights([named]) == 0
    assert generate(llm) == expected[0]
    assert llm.finish_weight_update() == 1
    assert generate(llm) == expected[1]
    with pytest.raises(RuntimeError, match="no update is open"):
        llm.finish_weight_update()


def test_an_update_that_ends_at_any_tensor_leaves_the_old_weights(
    llm: LLM, folders: list[Path], expected: list[Any]
) -> None:
    tensors = list(tensors_of(folders[1]).items())
    alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG, use_tqdm=False)]
    stream, come = started(llm, 2)

    def first(count: int, error: BaseException) -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors[:count]
        raise error

    for count in range(len(tensors) + 1):
        with pytest.raises(KeyboardInterrupt if count % 2 else OSError):
            llm.update_weights(first(count, KeyboardInterrupt() if count % 2 else OSError("gone")), mode="restart")
    assert llm.weights_version == 0
    assert list(map(tokens, finish(stream, come))) == alone, "who streams meanwhile notices nothing"
    assert generate(llm) == expected[0]
    llm.start_weight_update()
    with pytest.raises(OSError, match="gone"):
        llm.update_weights(first(3, OSError("gone")))
    with pytest.raises(RuntimeError, match="one has failed"):
        llm.finish_weight_update()
    assert llm.update_weights(tensors) == 1
    assert generate(llm) == expected[1]


def test_a_tensor_that_does_not_fit_is_named_and_changes_nothing(
    llm: LLM, folders: list[Path], expected: list[Any]
) -> None:
    tensors = tensors_of(folders[1])
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tensors[name]
    cases: list[tuple[Any, type[Exception], str]] = [
        ([(name, weight[:-1])], ValueError, rf"'{name}' has shape \(31, 48\), and \(32, 48\) in this model"),
        ([(name, weight.long())], ValueError, f"'{name}' has dtype int64"),
        ([(name, weight.to("meta"))], ValueError, f"'{name}' must be a dense tensor"),
        ([(name, weight.numpy())], TypeError, f"'{name}' must be a torch.Tensor, got ndarray"),
        ([(name, weight), (name, weight.clone())], ValueError, f"'{name}' comes twice"),
        ([(f"{name}s", weight)], ValueError, f"'{name}s' is no tensor of this model"),
        ([(3, weight)], TypeError, "got the name 3"),
        ([weight], TypeError, "pairs of a name and a tensor"),
        (
            [(name, weight), (name.replace("1", "0"), weight)],
            ValueError,
            "lies where .* did, and both are read at the end",
        ),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            llm.update_weights([*list(tensors.items())[:2], *given] if given[0] is not weight else given)
    with pytest.raises(ValueError, match="mode must be 'keep', 'recompute', 'restart', 'abort' or 'wait', got 'go'"):
        llm.update_weights(tensors, mode="go")
    assert llm.weights_version == 0
    assert generate(llm) == expected[0]


def test_a_tied_head_may_come_by_either_name_or_both(tmp_path: Path) -> None:
    old, new = save_two(tmp_path, tie_word_embeddings=True)
    tensors = tensors_of(new)
    embedding = tensors.pop("model.embed_tokens.weight")
    by_both = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding}
    with make_llm(old) as llm, make_llm(new) as fresh:
        expected = generate(fresh)
        for names in (["lm_head.weight"], ["model.embed_tokens.weight"], list(by_both), list(reversed(by_both))):
            llm.update_weights(tensors_of(old))
            llm.update_weights({**tensors, **{name: by_both[name] for name in names}})
            assert generate(llm) == expected, names
        with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from"):
            llm.update_weights({**by_both, "lm_head.weight": embedding + 1})


@pytest.mark.parametrize("beside", ["tier", "drafts", "draft model"])
def test_beside_other_features_of_the_engine(folders: list[Path], beside: str) -> None:
    """A tier keeps blocks by hashes, so those of old weights are not brought back. A draft model keeps its own."""
    draft_model = {"method": "draft_model", "model": str(folders[0]), "num_speculative_tokens": 3}
    options = {
        "tier": {"kv_offload_gb": 0.01},
        "drafts": {"speculative_config": NGRAM},
        "draft model": {"speculative_config": draft_model},
    }
    few = {"num_gpu_blocks_override": 12, "max_num_seqs": 2, **options[beside]}
    with make_llm(folders[0], **few) as llm, make_llm(folders[1]) as fresh:
        before, expected = generate(llm), generate(fresh)
        for _ in range(2):
            llm.update_weights(tensors_of(folders[1]))
            assert generate(llm) == expected
            llm.update_weights(tensors_of(folders[0]), mode="restart")
            assert generate(llm) == before


@pytest.mark.parametrize("quantization", ["fp8", "int8", "int8_dynamic", "int4"])
def test_what_was_quantized_at_load_is_quantized_again(tmp_path: Path, quantization: str) -> None:
    old, new = save_two(tmp_path, hidden_size=64, intermediate_size=64)
    with make_llm(old, quantization=quantization) as llm, make_llm(new, quantization=quantization) as fresh:
        assert generate(llm) != generate(fresh)
        llm.update_weights(tensors_of(new))
        assert generate(llm) == generate(fresh)


def test_what_the_checkpoint_has_quantized_is_refused_by_name(tmp_path: Path) -> None:
    """Also experts, and by the names of the dense tensors that a trainer has."""
    layers = "model.layers.0.mlp.experts.1.up_proj", "model.layers.1.self_attn.o_proj"
    mixture = {"architecture": "Qwen3MoeForCausalLM", "hidden_size": 64, "moe_intermediate_size": 64}
    folder, _ = save_quantized(tmp_path, FORMATS["AWQ"], dense=["mlp.gate."], **mixture)
    config = json.loads((folder / "config.json").read_text())
    edit_json(
        folder / "config.json",
        quantization_config={**config["quantization_config"], "modules_to_not_convert": ["lm_head", "mlp.gate"]},
    )
    tensors = tensors_of(folder)
    with make_llm(folder) as llm:
        before = generate(llm)
        for layer in layers:
            for name in (f"{layer}.qweight", f"{layer}.weight"):
                given = {"model.norm.weight": torch.zeros(64), name: tensors[f"{layer}.qweight"]}
                with pytest.raises(NotImplementedError, match=f"'{name}' cannot be updated: .* as the checkpoint has"):
                    llm.update_weights(given)
        with pytest.raises(NotImplementedError, match=r"could not be given again: .*; use sleep\(level=1\)"):
            llm.sleep(level=2)
        assert generate(llm) == before and llm.weights_version == 0
        llm.update_weights({"model.norm.weight": torch.zeros(64)})
        assert generate(llm) != before, "what is dense can be updated"


# -- requests in flight --


def started(llm: LLM, num_steps: int = 6) -> Any:
    """A stream of the prompts that has brought some tokens of each, and what has come so far, by request."""
    stream, come = llm.stream(PROMPTS, LONG), {}
    for _ in range(num_steps * len(PROMPTS)):
        output = next(stream)
        come.setdefault(output.request_id, []).append(output.outputs[0])
    return stream, come


def finish(stream: Any, come: dict[str, list[Any]]) -> list[list[Any]]:
    for output in stream:
        come[output.request_id].append(output.outputs[0])
    return [come[request_id] for request_id in sorted(come, key=int)]


def tokens(parts: list[Any]) -> list[int]:
    return [token_id for part in parts for token_id in part.token_ids]


def versions(parts: list[Any]) -> list[int]:
    return [version for part in parts for version in part.weights_versions]


@pytest.mark.parametrize("overlap_depth", [1, 3])
def test_tokens_name_the_weights_that_computed_them(folders: list[Path], overlap_depth: int) -> None:
    with make_llm(folders[0], overlap_depth=overlap_depth) as llm, make_llm(folders[1]) as fresh:
        alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG, use_tqdm=False)]
        stream, come = started(llm)
        llm.update_weights(tensors_of(folders[1]), mode="recompute")
        come_late, come_later = started(llm)
        llm.update_weights([])
        for prompt, parts, own in zip(PROMPTS, finish(stream, come), alone, strict=True):
            numbers = versions(parts)
            assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2} and len(numbers) == 40
            cut = numbers.index(1)
            assert tokens(parts)[:cut] == own[:cut]
            (rest,) = fresh.generate(
                [prompt + own[:cut]], SamplingParams(temperature=0, max_tokens=40 - cut), use_tqdm=False
            )
            assert tokens(parts)[cut:] == rest.outputs[0].token_ids, "as if the new weights had computed all before"
        for parts in finish(come_late, come_later):
            assert versions(parts)[0] == 1 and versions(parts)[-1] == 2
        (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        assert output.outputs[0].weights_versions == [2] * 8


def test_kept_requests_go_on_with_their_keys_and_values(folders: list[Path]) -> None:
    with make_llm(folders[0]) as llm:
        computed_before = []
        for mode in ("keep", "recompute"):
            stream, come = started(llm)
            before = llm.get_metrics()["num_tokens_computed"]
            llm.update_weights(tensors_of(folders[1]), mode=mode)
            results = finish(stream, come)
            computed_before.append(llm.get_metrics()["num_tokens_computed"] - before)
            assert all(len(tokens(parts)) == 40 for parts in results)
        assert computed_before[1] > computed_before[0] + sum(map(len, PROMPTS)) // 2


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_restarted_requests_are_wholly_of_the_new_weights(folders: list[Path], enable_prefix_caching: bool) -> None:
    params = SamplingParams(max_tokens=30, n=2, seed=5, logprobs=1, prompt_logprobs=1, repetition_penalty=1.2)
    with make_llm(folders[0], enable_prefix_caching=enable_prefix_caching) as llm, make_llm(folders[1]) as fresh:
        expected = fresh.generate(PROMPTS, params, use_tqdm=False)
        llm.enqueue(PROMPTS, params)
        for _ in range(8):
            llm.step()
        llm.update_weights(tensors_of(folders[1]), mode="restart")
        for output, other in zip(llm.wait_for_completion(use_tqdm=False), expected, strict=True):
            for one, two in zip(output.outputs, other.outputs, strict=True):
                assert one.token_ids == two.token_ids
                assert one.cumulative_logprob == pytest.approx(two.cumulative_logprob, abs=1e-4)
                assert one.weights_versions == [1] * 30
            assert [None, *(dict(entry) for entry in output.prompt_logprobs[1:])] == [
                None,
                *(dict(entry) for entry in other.prompt_logprobs[1:]),
            ]
        stream, come = started(llm)
        llm.update_weights(tensors_of(folders[0]), mode="restart")
        assert {0} != set(versions(finish(stream, come)[0])) >= {1, 2}, "a stream's tokens are not taken back"


def test_aborted_requests_return_what_they_have(llm: LLM, folders: list[Path], expected: list[Any]) -> None:
    llm.enqueue(PROMPTS, LONG)
    for _ in range(5):
        llm.step()
    llm.update_weights(tensors_of(folders[1]), mode="abort")
    for output in llm.wait_for_completion(use_tqdm=False):
        assert output.outputs[0].finish_reason == "abort" and 0 < len(output.outputs[0].token_ids) < 40
        assert set(output.outputs[0].weights_versions) == {0}
    assert generate(llm) == expected[1]


def test_an_update_may_wait_for_the_ends(llm: LLM, folders: list[Path]) -> None:
    alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG, use_tqdm=False)]
    llm.enqueue(PROMPTS, LONG)
    llm.step()
    llm.update_weights(tensors_of(folders[1]), mode="wait")
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert all(set(output.outputs[0].weights_versions) == {0} for output in outputs)


def test_a_pause_holds_what_is_asked_for(llm: LLM, expected: list[Any]) -> None:
    llm.enqueue(PROMPTS, GREEDY)
    for _ in range(3):
        llm.step()
    llm.pause("keep")
    assert llm.is_paused
    computed = llm.get_metrics()["num_tokens_computed"]
    llm.enqueue(PROMPTS, GREEDY)
    for _ in range(3):
        llm.step()
    assert llm.get_metrics()["num_tokens_computed"] == computed
    with pytest.raises(RuntimeError, match="resume"):
        llm.pause("wait")
    llm.resume()
    outputs = [output.outputs[0].token_ids for output in llm.wait_for_completion(use_tqdm=False)]
    assert outputs == expected[0].token_ids * 2
    llm.pause()
    assert not llm.has_unfinished_requests()
    llm.resume()
    assert generate(llm) == expected[0]


def test_messages_to_other_processes_are_bounded_over_many_calls(
    llm: LLM, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    tensors = tensors_of(folders[1])
    monkeypatch.setattr(update, "_BYTES_AT_ONCE", 2 * max(tensor.nbytes for tensor in tensors.values()))
    elsewhere = update.Update(llm._session, update.table_of(llm._session)._replace(process=-1))
    monkeypatch.setattr(update, "on_workers", lambda session, hold: sent.append(len(hold.tensors)))
    for named in tensors.items():
        elsewhere.take([named])
    assert len(sent) > 1 and sum(sent) < len(tensors)
