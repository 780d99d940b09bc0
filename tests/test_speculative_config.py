from typing import Any

import pytest

from nanovllm import EngineConfig
from nanovllm.engine.speculation.proposer import make_proposals
from nanovllm.speculative_config import SpeculativeConfig, read_speculative_config


class Silent:
    """Made by its name in a test below."""

    def __init__(self, config: SpeculativeConfig | None = None) -> None:
        self.config = config

    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        return []


def test_what_asks_for_nothing_and_what_vllm_says() -> None:
    assert EngineConfig(model="m", speculative_config={}) == EngineConfig(model="m", speculative_config=None)
    config = EngineConfig(model="m", speculative_config={"method": "ngram", "num_speculative_tokens": 4})
    assert isinstance(config.speculative_config, SpeculativeConfig)
    assert config.speculative_config.lookup_range == (2, 5)
    old = read_speculative_config({"model": "[ngram]", "num_speculative_tokens": 4, "prompt_lookup_max": 3})
    assert old is not None and (old.method, old.lookup_range) == ("ngram", (3, 3))
    read_speculative_config({"method": "suffix", "num_speculative_tokens": 8, "suffix_decoding_max_cached_requests": 0})
    old = read_speculative_config({"method": "deepseek_mtp", "num_speculative_tokens": 1})
    assert old is not None and old.method == "mtp"


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "ngram"}, ValueError, "needs 'num_speculative_tokens'"),
    ({"num_speculative_tokens": 3}, ValueError, "needs 'method'"),
    ({"method": "magic", "num_speculative_tokens": 3}, ValueError, "method must be one of ngram, suffix"),
    ({"method": "mtp", "num_speculative_tokens": 1, "model": "m"}, ValueError, "is for method 'custom_class' or"),
    (
        {"method": "dflash2", "num_speculative_tokens": 8},
        NotImplementedError,
        "'dflash2' is not supported; use",
    ),
    ({"method": "ngram", "num_speculative_tokens": 0}, ValueError, r"num_speculative_tokens must be in \[1, 63\]"),
    ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup": 3}, TypeError, "no option 'prompt_lookup'"),
    ({"method": "suffix", "num_speculative_tokens": 3, "prompt_lookup_max": 3}, ValueError, "is for method 'ngram'"),
    (
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 4},
        ValueError,
        r"prompt_lookup_min \(4\) must be at most prompt_lookup_max \(2\)",
    ),
    ({"method": "custom_class", "num_speculative_tokens": 3}, ValueError, "needs either proposer="),
    ({"method": "custom_class", "num_speculative_tokens": 3, "proposer": 7}, TypeError, "a method propose, got 7"),
    (
        {"method": "suffix", "num_speculative_tokens": 3, "suffix_decoding_max_cached_requests": 10},
        TypeError,
        "the request's own tokens",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_is_wrong_is_said_before_any_work(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EngineConfig(model="m", speculative_config=given)


def test_no_dict_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="must be a dict, got 'ngram'"):
        EngineConfig(model="m", speculative_config="ngram")  # type: ignore[arg-type]


def config_of(path: str) -> SpeculativeConfig:
    return SpeculativeConfig(method="custom_class", num_speculative_tokens=2, model=path)


def test_a_proposer_is_found_by_its_name() -> None:
    make_proposals(config_of(f"{__name__}.Silent"), 9)
    with pytest.raises(ValueError, match=r"'no.such.Class' is no class that can be imported .*; give 'package\.module"):
        make_proposals(config_of("no.such.Class"), 9)
    with pytest.raises(TypeError, match="must be a class with a method propose"):
        make_proposals(config_of("collections.Counter"), 9)
