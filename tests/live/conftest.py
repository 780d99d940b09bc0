"""Two checkpoints of one model, what each generates, and an engine on the first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.live.new_weights import generate, make_llm, save_two


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[Any]:
    results = []
    for folder in folders:
        with make_llm(folder) as llm:
            results.append(generate(llm))
    assert results[0] != results[1]
    return results


@pytest.fixture
def llm(folders: list[Path]) -> Iterator[LLM]:
    with make_llm(folders[0]) as llm:
        yield llm
