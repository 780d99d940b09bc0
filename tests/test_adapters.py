"""Adapters in a running engine: many in one batch, however it runs; added, replaced and removed meanwhile."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.lora.request import LoRARequest
from tests.llm_checks import check_nothing_is_left
from tests.lora.random_adapters import logprobs_of, make_tensors, merged, request, save
from tests.tiny_models import hugging_face_greedy, inner_model, load_hugging_face, random_prompts, save_random

NUM_ADAPTERS = 8
PROMPTS = random_prompts([1, 7, 8, 9, 30, 16, 41, 3, 24])
PROMPTS[5] = PROMPTS[6][:16]  # a prefix of another one, of another adapter
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8, "max_num_seqs": 16}
    return LLM(str(folder), **{"enable_lora": True, "max_loras": NUM_ADAPTERS, **defaults, **options})


def tokens(llm: LLM, prompts: Sequence[Any], params: Any, adapters: Any) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM")


@pytest.fixture(scope="module")
def adapters(folder: Path) -> list[LoRARequest | None]:
    """Eight, of different ranks and layers, and none."""
    hf = load_hugging_face(folder)
    patterns = [".*_proj|embed_tokens|lm_head", "q_proj|v_proj", "down_proj", ".*_proj"]
    return [
        request(f"a{i}", make_tensors(hf, patterns[i % 4], rank=1 + i, seed=i), 1 + i, 2 + 2 * i)
        for i in range(NUM_ADAPTERS)
    ] + [None]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with make_llm(folder, max_cpu_loras=20) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(folder: Path, adapters: list[LoRARequest | None]) -> list[list[int]]:
    """What Hugging Face's models with merged weights say."""
    wanted = []
    for prompt, adapter in zip(PROMPTS, adapters, strict=True):
        hf = load_hugging_face(folder)
        if adapter is not None:
            assert adapter.tensors is not None
            hf = merged(folder, adapter.tensors, adapter.peft_config["lora_alpha"] / adapter.peft_config["r"])
        wanted.append(hugging_face_greedy(hf, prompt, 12))
    assert len({tuple(one) for one in wanted}) == len(wanted), "adapters make no difference"
    return wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16, "overlap_depth": 2},  # prompts in chunks
        {"num_gpu_blocks_override": 16, "max_model_len": 64},  # preempted
        {"max_loras": 2, "max_cpu_loras": 8},  # they wait for each other's slots
        {"deterministic": True, "enable_prefix_caching": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
        pytest.param({"data_parallel_size": 2, "max_loras": 4, "max_cpu_loras": 8}, marks=pytest.mark.slow),
        pytest.param({"tensor_parallel_size": 2, "overlap_depth": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "chunks", "preemption", "few slots", "deterministic", "drafts", "two replicas", "two ranks"],
)
def test_eight_and_base_in_a_batch_are_each_alone(
    folder: Path, adapters: list[LoRARequest | None], alone: list[list[int]], options: dict[str, Any]
) -> None:
    with make_llm(folder, **options) as llm:
        for _ in range(2):  # the second finds the first's blocks
            assert tokens(llm, PROMPTS, GREEDY, adapters) == [[one] for one in alone]
        metrics = llm.get_metrics()
        assert "num_gpu_blocks_override" not in options or metrics["num_preemptions"] > 0
        has_hits = llm.config.enable_prefix_caching and "num_gpu_blocks_override" not in options
        assert not has_hits or metrics["num_prompt_tokens_cached"] > 0
        check_nothing_is_left(llm)


def test_several_sequences_and_seeds(llm: LLM, adapters: list[LoRARequest | None]) -> None:
    params = [SamplingParams(n=3, seed=i, temperature=1.0, max_tokens=8) for i in range(len(PROMPTS))]
    together = tokens(llm, PROMPTS, params, adapters)
    for prompt, param, adapter, want in zip(PROMPTS, params, adapters, together, strict=True):
        assert tokens(llm, [prompt], param, adapter) == [want]


def test_blocks_of_one_adapter_are_never_another_s(llm: LLM, adapters: list[LoRARequest | None]) -> None:
    (prompt,) = random_prompts([40], seed=9)
    llm.reset_prefix_cache()
    firsts = [llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=adapter)[0] for adapter in adapters]
    again = [llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=adapter)[0] for adapter in adapters]
    assert [output.num_cached_tokens for output in firsts] == [0] * len(adapters)
    assert [output.num_cached_tokens for output in again] == [32] * len(adapters)
    assert [output.outputs[0].token_ids for output in firsts] == [output.outputs[0].token_ids for output in again]


# -- policy and reference --


def test_policy_and_reference_are_one_call(folder: Path, llm: LLM, adapters: list[LoRARequest | None]) -> None:
    policy, prompt = adapters[1], PROMPTS[4]
    assert policy is not None and policy.tensors is not None
    models = [merged(folder, policy.tensors, 2.0), load_hugging_face(folder)]
    want = [logprobs_of(hf, prompt) for hf in models]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([prompt, prompt], params, use_tqdm=False, lora_request=[policy, None])
    for output, logprobs in zip(outputs, want, strict=True):
        got = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        torch.testing.assert_close(torch.tensor(got), logprobs, rtol=1e-5, atol=1e-5)
    prefix, option = prompt[:20], prompt[20:]
    scores = llm.score(prefix, [option, option[:3]], lora_request=[policy, None])
    for (whole, begun), logprobs in zip(scores, want, strict=True):
        assert whole == pytest.approx(logprobs[19:].sum().item(), abs=1e-4)
        assert begun == pytest.approx(logprobs[19:22].sum().item(), abs=1e-4)
    assert llm.score(prefix, [option], lora_request=policy) == pytest.approx(scores[0][:1])
    assert llm.score(prefix, [option]) == pytest.approx(scores[1][:1])


def test_other_calls_take_adapters(llm: LLM, adapters: list[LoRARequest | None]) -> None:
    prompt, adapter = PROMPTS[6], adapters[0]
    ((want,),) = tokens(llm, [prompt], GREEDY, adapter)
    assert [new for output in llm.stream([prompt], GREEDY, adapter) for new in output.outputs[0].token_ids] == want
    llm.add_request(prompt, GREEDY, lora_request=adapter)
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert outputs[0].outputs[0].token_ids == want
    llm.enqueue([prompt], GREEDY, lora_request=adapter)
    assert llm.wait_for_completion(use_tqdm=False)[0].outputs[0].token_ids == want
    ours, base = (llm.embed([prompt], lora_request=one)[0].outputs.embedding for one in (adapter, None))
    assert ours == llm.embed([prompt], lora_request=adapter)[0].outputs.embedding != base


def test_coroutines(folder: Path, adapters: list[LoRARequest | None], alone: list[list[int]]) -> None:
    async def run() -> list[list[int]]:
        async with AsyncLLM(
            str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, enable_lora=True, max_loras=3,
            max_cpu_loras=8,
        ) as engine:  # fmt: skip

            async def one(prompt: list[int], adapter: LoRARequest | None) -> list[int]:
                async for output in engine.generate(prompt, GREEDY, lora_request=adapter):
                    last = output
                return last.outputs[0].token_ids

            found = await asyncio.gather(*(one(p, a) for p, a in zip(PROMPTS, adapters, strict=True)))
            assert len(await engine.list_loras()) == 8 and await engine.pin_lora("a3")
            assert await engine.remove_lora("a3") and not await engine.remove_lora("a3")
            assert await engine.add_lora(adapters[3])
            return found

    assert asyncio.run(run()) == alone


# -- added, replaced, removed --


def test_a_replaced_adapter_is_the_new_one_at_once_and_the_old_one_for_who_has_begun(folder: Path, llm: LLM) -> None:
    """Tensors are read anew by every `add_lora`, as a trainer changes them in place."""
    hf, prompt = load_hugging_face(folder), PROMPTS[6]
    tensors = make_tensors(hf, seed=50)
    before, policy = {name: tensor.clone() for name, tensor in tensors.items()}, request("policy", tensors)
    want = [hugging_face_greedy(merged(folder, before, 2.0), prompt, 12)]
    assert llm.add_lora(policy)
    llm.add_request(prompt, GREEDY, lora_request=policy)
    for _ in range(3):
        llm.step()
    for tensor in tensors.values():
        tensor.mul_(-0.5)
    assert llm.add_lora(policy)
    want.append(hugging_face_greedy(merged(folder, tensors, 2.0), prompt, 12))
    assert want[0] != want[1]
    assert tokens(llm, [prompt], GREEDY, policy) == [[want[1]]]
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert outputs[0].outputs[0].token_ids == want[0]
    assert llm.remove_lora("policy")
    assert tokens(llm, [prompt], GREEDY, policy) == [[want[1]]], "a request brings its adapter along"


@pytest.mark.parametrize("is_tied", [False, True])
def test_new_weights_of_the_model_keep_its_adapters(tmp_path: Path, is_tied: bool) -> None:
    folders = [save_random(tmp_path / str(i), seed=i, tie_word_embeddings=is_tied) for i in range(2)]
    models = [load_hugging_face(folder) for folder in folders]
    tensors, prompt = make_tensors(models[0]), PROMPTS[6]
    with make_llm(folders[0]) as llm:
        adapter = request("one", tensors)
        for folder, hf in zip(folders, models, strict=True):
            llm.update_weights(hf.state_dict())
            want = [hugging_face_greedy(model, prompt, 12) for model in (merged(folder, tensors, 2.0), hf)]
            assert tokens(llm, [prompt] * 2, GREEDY, [adapter, None]) == [[one] for one in want]


def test_folders_are_read_once_or_in_place(folder: Path, llm: LLM, tmp_path: Path) -> None:
    hf, prompt = load_hugging_face(folder), PROMPTS[6]
    first, second = make_tensors(hf, seed=60), make_tensors(hf, seed=61)
    want = [[hugging_face_greedy(merged(folder, tensors, 2.0), prompt, 12)] for tensors in (first, second)]
    path = save(tmp_path / "adapter", first)
    adapter = LoRARequest("files", 900, str(path))
    assert tokens(llm, [prompt], GREEDY, adapter) == want[:1]
    save(path, second)
    assert tokens(llm, [prompt], GREEDY, adapter) == want[:1], "it was read before"
    in_place = LoRARequest("files", 900, str(path), load_inplace=True)
    assert tokens(llm, [prompt], GREEDY, in_place) == want[1:]
    other = LoRARequest("files", 901, str(save(tmp_path / "other", first)))
    assert tokens(llm, [prompt], GREEDY, other) == want[:1]
    assert 901 in llm.list_loras() and 900 not in llm.list_loras()
    assert llm.remove_lora(901) and not llm.remove_lora(901)


def test_one_more_takes_the_place_of_the_least_recently_asked_for(
    folder: Path, adapters: list[LoRARequest | None]
) -> None:
    a, b, c, d = adapters[:4]
    with make_llm(folder, max_loras=1, max_cpu_loras=3) as llm:
        for adapter in (a, b, c):
            llm.add_lora(adapter)
        llm.pin_lora("a0")
        tokens(llm, [PROMPTS[0]], GREEDY, b)
        llm.add_lora(d)
        assert {llm._adapters._name_of(i) for i in llm.list_loras()} == {"a0", "a1", "a3"}
        store = inner_model(llm).adapters
        assert len(store._known) == 3, "what nobody asks for is gone"
        for name in ("a1", "a3"):
            llm.pin_lora(name)
        with pytest.raises(ValueError, match=r"all 3 adapters .* are pinned"):
            llm.add_lora(c)
        with pytest.raises(ValueError, match="no adapter 'x' to pin"):
            llm.pin_lora("x")
        llm.remove_lora("a3")
        with pytest.raises(FileNotFoundError):
            llm.add_lora(LoRARequest("bad", "nowhere"))
        assert a is not None and a.tensors is not None
        llm.add_lora(LoRARequest("twin", 77, tensors=a.tensors, peft_config=a.peft_config))
        assert 77 in llm.list_loras() and len(llm.list_loras()) == 3, "of the same content, and a name of its own"


def test_who_only_looks_does_not_wait_for_one_that_is_read(
    llm: LLM, adapters: list[LoRARequest | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event loop asks for the list, pins, and hands requests in while another adapter is read."""
    known = adapters[0]
    assert known is not None
    want = tokens(llm, [PROMPTS[6]], GREEDY, known)
    is_reading, may_end = threading.Event(), threading.Event()
    found: list[Any] = []

    def read(request: LoRARequest) -> None:
        is_reading.set()
        may_end.wait(60)
        raise FileNotFoundError("it is not there")

    def look() -> None:
        found.extend([llm.list_loras(), llm.pin_lora(known.lora_name), tokens(llm, [PROMPTS[6]], GREEDY, known)])

    monkeypatch.setattr("nanovllm.lora.adapter_files.read_adapter", read)
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(llm.add_lora, LoRARequest("slow", "nowhere"))
        assert is_reading.wait(60)
        looking = threads.submit(look)
        try:
            looking.result(30)
        finally:
            may_end.set()
        with pytest.raises(FileNotFoundError):
            reading.result()
    assert known.lora_int_id in found[0] and found[1:] == [True, want]


def test_a_thousand_loads_and_removals_under_load(folder: Path) -> None:
    """Requests of an adapter that stays, and of none, run all the while and notice nothing; nothing is left behind."""
    hf = load_hugging_face(folder)
    stays, prompt = request("stays", make_tensors(hf, seed=1)), PROMPTS[6]
    changing = [make_tensors(hf, "q_proj", rank=1, seed=i) for i in range(4)]
    with make_llm(folder, max_loras=2, max_cpu_loras=3) as llm:
        want = tokens(llm, [prompt] * 2, GREEDY, [stays, None])
        results, is_done = [], threading.Event()

        def load() -> None:
            while not is_done.is_set():
                results.append(tokens(llm, [prompt] * 2, GREEDY, [stays, None]))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for i in range(1000):
                name = f"changing {i % 3}" if i % 2 else "changing"
                adapter = request(name, changing[i % 4], 1)
                llm.add_lora(adapter)
                if i % 50 == 0:
                    tokens(llm, [prompt[:3]], SamplingParams(max_tokens=1), adapter)
                assert llm.remove_lora(name)
        finally:
            is_done.set()
            thread.join()
        assert len(results) > 5 and all(result == want for result in results)
        assert llm.list_loras() == {stays.lora_int_id}
        llm.remove_lora("stays")
        store = inner_model(llm).adapters
        assert not store._known and not store.step.filled
        check_nothing_is_left(llm)


# -- what is refused --


def test_what_is_refused_changes_nothing(folder: Path, llm: LLM, tmp_path: Path) -> None:
    hf = load_hugging_face(folder)
    known = llm.list_loras()
    good = make_tensors(hf, "q_proj")
    name = next(iter(good))
    unknown = {n.replace("q_proj", "x_proj"): t for n, t in good.items()}
    of_experts = {n.replace("self_attn.q_proj", "mlp.experts"): t for n, t in good.items()}
    table = make_tensors(hf, "embed_tokens")
    for tensors, rank, words in [
        (
            unknown,
            4,
            "'bad' is for model.layers.0.self_attn.x_proj, and the model has no layer of that name that takes one",
        ),
        (of_experts, 4, "adapters of experts are not supported"),
        ({**good, name: good[name][:, :5]}, 4, r"a of model.layers.0.self_attn.q_proj is \(4, 5\), not rank x 32"),
        (
            {"base_model.model.model.embed_tokens.lora_B.bias": torch.zeros(32), **table},
            4,
            "a table, which takes none",
        ),
        (make_tensors(hf, "q_proj", rank=17), 17, "has rank 17, and max_lora_rank is 16"),
        ({**good, "base_model.model.model.layers.0.self_attn.q_proj.bias": torch.zeros(512)}, 4, "which has none"),
    ]:
        with pytest.raises(ValueError, match=words):
            llm.generate([PROMPTS[0]] * 2, GREEDY, lora_request=[None, request("bad", tensors, rank)])
    own = {"base_model.model.model.embed_tokens.base_layer.weight": hf.model.embed_tokens.weight.detach()}
    assert llm.add_lora(request("own", {**good, **own})), "PEFT repeats tables as they are"
    with pytest.raises(NotImplementedError, match=r"brings another matrix for model\.embed_tokens"):
        llm.add_lora(request("bad", {**good, **{n: t + 1 for n, t in own.items()}}))
    with pytest.raises(ValueError, match="2 lora_request for 1 prompts"):
        llm.generate([PROMPTS[0]], GREEDY, lora_request=[None, None])
    with pytest.raises(ValueError, match=r"'twin' has the lora_int_id \d+ of 'own'"):
        llm.add_lora(LoRARequest("twin", request("own", good).lora_int_id, str(save(tmp_path, good))))
    llm.remove_lora("own")
    assert llm.list_loras() == known
    check_nothing_is_left(llm)


def test_an_engine_without_adapters_says_so(folder: Path) -> None:
    with make_llm(folder, **{"enable_lora": False}) as llm, pytest.raises(ValueError, match="enable_lora=True"):
        llm.generate([PROMPTS[0]], GREEDY, lora_request=LoRARequest("a", "nowhere"))
