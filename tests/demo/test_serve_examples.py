"""examples/serve_*.py against a server with the demo model."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import Running

pytest.importorskip("openai")
pytest.importorskip("anthropic")
pytestmark = pytest.mark.demo_model
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    running = Running("demo", max_model_len=1024, kv_cache_memory_bytes=200_000_000, max_num_seqs=8)
    running.served.tokenizer.hf.chat_template = (EXAMPLES / "tools.jinja").read_text()
    yield running.url
    running.close()


SAYS = {
    "openai": r"Rome.*\nCity\(name='.+', country='.+', is_capital=(True|False)\)\n",
    "many": r"(?:\n|^)Chess is( \S+){7}",
    "tools": r"temperature\(\{'city': '.*', 'unit': '(celsius|fahrenheit)'\}\)\n.+",
    "anthropic": r"\d+ tokens are asked:\n.+\n\[(max_tokens|end_turn)\]\n",
}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_URL", url)
    runpy.run_path(str(EXAMPLES / f"serve_{name}.py"))
    assert re.search(SAYS[name], capsys.readouterr().out, re.DOTALL)
