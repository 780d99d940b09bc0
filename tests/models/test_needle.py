"""A needle in 8,000 tokens is found after a hit, by a model that can do nothing else: it repeats what followed a token.

A short convolution writes each token's predecessor beside it; attention looks for the present token among the
predecessors, and says what stands there (an induction head; Olsson et al., 2022). So what is found depends on keys and
values of long ago, and on the convolution's state where a hit begins.
"""

from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.tiny_models import load_hugging_face, save_random

NUM_TOKENS = 48  # of the vocabulary: a token, its predecessor and what is found have as many dimensions each
HIDDEN = 3 * NUM_TOKENS
SLOW = 18  # pairs of dimensions that turn faster than 1e-7 a token are not used
KEY, VALUE, LATE_KEY, LATE_VALUE = 44, 45, 46, 47
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(
        tmp_path_factory.mktemp("needle"),
        "Lfm2ForCausalLM",
        **{"vocab_size": NUM_TOKENS, "hidden_size": HIDDEN, "num_attention_heads": 1, "num_key_value_heads": 1},
        **{"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "max_position_embeddings": 16384},
        **{"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e30}},
    )
    model = load_hugging_face(folder)
    one, tokens = torch.eye(NUM_TOKENS), slice(0, NUM_TOKENS)
    before, found = slice(NUM_TOKENS, 2 * NUM_TOKENS), slice(2 * NUM_TOKENS, HIDDEN)
    places = slice(SLOW, SLOW + NUM_TOKENS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, tokens] = one
        conv, attention = model.model.layers[0].conv, model.model.layers[1].self_attn
        gates, inputs = conv.in_proj.weight[: 2 * HIDDEN], conv.in_proj.weight[2 * HIDDEN :]
        gates[:, tokens] = HIDDEN**-0.5  # of a normed token, 1
        inputs[before, tokens] = one * HIDDEN**-0.5
        conv.conv.weight[:, 0, 1] = 1.0  # of three, the one before the last
        conv.out_proj.weight[:] = torch.eye(HIDDEN)
        attention.q_proj.weight[places, tokens] = one
        attention.k_proj.weight[places, before] = one
        attention.v_proj.weight[places, tokens] = one
        attention.out_proj.weight[found, places] = one
        attention.q_layernorm.weight.fill_(2.0)
        model.lm_head.weight[:, found] = one
    model.save_pretrained(folder)
    return folder


def test_a_needle_is_found_after_a_hit(folder: Path) -> None:
    """One far in the cached part; and one whose key is the last token there, and its value the first behind it."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, KEY, (8000,), generator=generator).tolist()
    first[100:102] = KEY, VALUE
    first[-1] = LATE_KEY
    turns = [[*first, LATE_VALUE, *first[:60], asked] for asked in (LATE_KEY, KEY)]
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, max_model_len=9000) as llm:
        llm.generate([[*first, 0]], ONE, use_tqdm=False)
        outputs = [llm.generate([turn], ONE, use_tqdm=False)[0] for turn in turns]
    assert [output.num_cached_tokens for output in outputs] == [8000, 8048]
    assert [output.outputs[0].token_ids for output in outputs] == [[LATE_VALUE], [VALUE]]
