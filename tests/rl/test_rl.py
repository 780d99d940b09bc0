"""Rollouts and the comparison of log-probabilities, with a trainer that has what TRL's has and no more."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.cli.main import main
from nanovllm.rl import Rollout, compare_logprobs, rollout_func
from nanovllm.rl.consistency import mean_and_worst
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, load_hugging_face, save_random, save_tokenizer

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 8}
PROMPTS = ["once upon", "once upon", "the end", "the end"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def trainer(folder: Path) -> SimpleNamespace:
    """As GRPOTrainer has them, in TRL 1.16."""
    from transformers import AutoTokenizer

    args = SimpleNamespace(
        seed=3, max_completion_length=12, temperature=0.8, top_p=0.9, top_k=None, min_p=None, repetition_penalty=1.0,
        generation_kwargs=None, chat_template_kwargs=None,
    )  # fmt: skip
    return SimpleNamespace(
        model=load_hugging_face(folder),
        args=args,
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(process_index=0, unwrap_model=lambda model: model),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def their_logprobs(trainer: SimpleNamespace, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """Of the distribution that the tokens are drawn from, without the filter's renormalization where it kept all."""
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logits = trainer.model(ids).logits[0, len(prompt_ids) - 1 : -1] / trainer.args.temperature
    values: list[float] = logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None])[:, 0].tolist()
    return values


def test_a_rollout_follows_the_trainers_steps(trainer: SimpleNamespace) -> None:
    trainer.args.top_p = 1.0
    rollout = Rollout(**OPTIONS, deterministic=True)
    with pytest.raises(RuntimeError, match="built at the first rollout"):
        _ = rollout.llm
    for step in range(3):
        trainer.state.global_step = step
        result = rollout(PROMPTS, trainer)
        again = rollout(PROMPTS, trainer)
        assert rollout.llm.weights_version == step, "an update for each step, and none within one"
        assert again["completion_ids"] != result["completion_ids"], "other draws"
        assert [len(ids) for ids in result["prompt_ids"]] == [10, 10, 8, 8]
        for row in zip(*(result[name] for name in ("prompt_ids", "completion_ids", "logprobs")), strict=True):
            assert 0 < len(row[1]) == len(row[2]) <= 12
            assert row[2] == pytest.approx(their_logprobs(trainer, row[0], row[1]), abs=1e-4)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
    rollout.llm.close()


def test_the_same_run_draws_the_same_tokens(folder: Path, trainer: SimpleNamespace) -> None:
    runs = []
    for _ in range(2):
        rollout = Rollout(**OPTIONS, deterministic=True)
        trainer.model = load_hugging_face(folder)
        runs.append([rollout(PROMPTS, trainer)["completion_ids"] for _ in range(2)])
        rollout.llm.close()
    assert runs[0] == runs[1]


def test_one_function_serves_one_trainer(trainer: SimpleNamespace) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    first = rollout_func([conversation], trainer)
    assert first["prompt_ids"][0] == trainer.processing_class.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    llm = trainer._nanovllm_rollout.llm
    rollout_func(["a"], trainer)
    assert trainer._nanovllm_rollout.llm is llm
    llm.close()
    trainer.model.merge_adapter = None
    with pytest.raises(NotImplementedError, match="PEFT adapter"):
        Rollout()(PROMPTS, trainer)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS, deterministic=True) as llm:
        yield llm


def test_an_engine_and_a_trainer_agree_on_log_probabilities(folder: Path, llm: LLM) -> None:
    found = compare_logprobs(llm, load_hugging_face(folder), PROMPTS, SamplingParams(max_tokens=20, seed=1))
    assert [len(row) for row in found.trainer] == [len(ids) for ids in found.token_ids]
    mean, worst = mean_and_worst(found.trainer)
    assert 0 < mean < worst < 1e-4
    assert mean_and_worst(found.rescored) == (0.0, 0.0), "to the bit, in deterministic mode"
    assert mean_and_worst([[0.5], [-1.0, 0.0]]) == (0.5, 1.0)
    with (
        LLM(str(folder), **OPTIONS, logprobs_mode="processed_logprobs") as other,
        pytest.raises(ValueError, match="compared as raw_logprobs"),
    ):
        compare_logprobs(other, None, PROMPTS)


def test_the_command_reports_and_judges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check-logprobs", str(folder), "--prompt", "once", "--max-tokens", "3", "--dtype", "float32"]
    options = ["--device", "cpu", "--max-model-len", "64", "--deterministic", "--positions"]
    assert main([*command, *options]) == 0
    out = capsys.readouterr().out
    assert "engine, rescored: mean 0, worst 0 over 3 tokens" in out and "trainer's forward pass: mean" in out
    assert len(out.splitlines()) == 1 + 3 + 2
    assert main([*command, *options, "--tolerance", "1e-12"]) == 1
