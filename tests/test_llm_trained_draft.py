"""A target and a draft model that were trained on the same language: what is accepted is what teacher forcing says.

The draft has never seen the exceptions of the language, so it is wrong at some places; transformers tells at which.
"""

import random
from pathlib import Path

import pytest
import torch
import transformers

from nanovllm import LLM, SamplingParams
from tests.runner.fake_graphs import fake_graphs

VOCAB, NUM_TOKENS, LENGTH = 32, 3, 60
CIRCLES = [random.Random(seed).sample(range(VOCAB), VOCAB) for seed in range(2)]  # each of all tokens


def sentence(rng: random.Random, length: int, has_exceptions: bool = True) -> list[int]:
    """The next token is that of the first circle; of the second one for a few, where the token before was even."""
    tokens = [rng.randrange(VOCAB), rng.randrange(VOCAB)]
    while len(tokens) < length:
        before, last = tokens[-2:]
        circle = CIRCLES[has_exceptions and last % 3 == 0 and before % 2 == 0]
        tokens.append(circle[(circle.index(last) + 1) % VOCAB])
    return tokens


def train(folder: Path, num_layers: int, num_steps: int, has_exceptions: bool) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": num_layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )
    model, rng = transformers.LlamaForCausalLM(config), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        batch = torch.tensor([sentence(rng, 32, has_exceptions) for _ in range(8)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def agreements(draft: Path, token_ids: list[int]) -> list[bool]:
    """By teacher forcing: would the draft model say the token at i + 1 behind those up to i?"""
    model = transformers.LlamaForCausalLM.from_pretrained(draft).eval()
    with torch.no_grad():
        said = model(torch.tensor([token_ids])).logits[0].argmax(-1).tolist()
    return [a == b for a, b in zip(said, token_ids[1:], strict=False)]


def expected_counts(agrees: list[bool], num_prompt: int, num_total: int) -> tuple[int, list[int]]:
    """Drafts, and how often the token at each place of one was accepted. The first token comes without a draft."""
    num_drafts, accepted = 0, [0] * NUM_TOKENS
    known = num_prompt + 1
    while known < num_total:
        length = min(NUM_TOKENS, num_total - known - 1)
        run = 0
        while run < length and agrees[known - 1 + run]:
            accepted[run] += 1
            run += 1
        num_drafts += length > 0
        known += run + 1
    return num_drafts, accepted


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("trained")
    return train(root / "target", 2, 40, has_exceptions=True), train(root / "draft", 1, 20, has_exceptions=False)


@pytest.mark.parametrize("captured", [False, True])
def test_acceptance_is_that_of_teacher_forcing(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    target, draft = folders
    rng = random.Random(2)
    prompts = [sentence(rng, 4 + i) for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=LENGTH)
    defaults = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 128}
    with LLM(str(target), **defaults) as llm:
        plain = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    num_drafts, accepted = 0, [0] * NUM_TOKENS
    for prompt, output in zip(prompts, plain, strict=True):
        assert len(output) == LENGTH
        drafts, counts = expected_counts(agreements(draft, prompt + output), len(prompt), len(prompt) + LENGTH)
        num_drafts, accepted = num_drafts + drafts, [a + b for a, b in zip(accepted, counts, strict=True)]
    share = sum(accepted) / (NUM_TOKENS * num_drafts)
    assert 0.1 < share < 0.95, "the draft is right at some places, and wrong at others"
    if captured:
        fake_graphs(monkeypatch)
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_TOKENS, "adaptive": False}
    with LLM(str(target), **defaults, max_num_seqs=1, speculative_config=config) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        metrics = llm.get_metrics()
    assert [output.outputs[0].token_ids for output in outputs] == plain
    measured = [metrics[f"spec_decode_num_accepted_tokens_per_pos_{i}"] for i in range(NUM_TOKENS)]
    assert (metrics["spec_decode_num_drafts"], measured) == (num_drafts, accepted)
    assert metrics["spec_decode_num_accepted_tokens"] == sum(accepted)
