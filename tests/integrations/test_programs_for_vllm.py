"""lm-eval, LangChain and outlines, which are written for vLLM, run on this engine: their answers are its own.

    bash scripts/test_integrations.sh       installs them into an environment of their own

Each test runs in a process of its own, where `nanovllm.as_vllm` gives them the engine under vLLM's name.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

pytestmark = pytest.mark.integrations
ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 200, "kv_cache_memory_bytes": 10_000_000}
PREFIX, OPTIONS = "The sky is", [" blue", " green and"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("random"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(str(folder), **SMALL) as llm:
        yield llm


def run_program(package: str, code: str, folder: Path) -> Any:
    """What the program prints last, as JSON. It finds `folder` and `small`, and a `vllm`."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; run scripts/test_integrations.sh")
    begin = f"import json, nanovllm.as_vllm\nfolder, small = {str(folder)!r}, {SMALL!r}\n"
    command = [sys.executable, "-c", begin + code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


LM_EVAL = f"""
from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM

lm = VLLM(pretrained=folder, max_num_seqs=4, **small)
asked = [Instance("loglikelihood", {{}}, ({PREFIX!r}, option), i) for i, option in enumerate({OPTIONS!r})]
until = Instance("generate_until", {{}}, ({PREFIX!r}, {{"until": ["x"], "max_gen_toks": 6, "temperature": 0}}), 0)
print(json.dumps([[score for score, _ in lm.loglikelihood(asked)], lm.generate_until([until])[0], lm.max_length]))
"""


def test_lm_eval_scores_options_as_the_engine_does(folder: Path, llm: LLM) -> None:
    scores, text, max_length = run_program("lm_eval", LM_EVAL, folder)
    assert scores == pytest.approx(llm.score(PREFIX, OPTIONS), rel=1e-4)
    (output,) = llm.generate(PREFIX, SamplingParams(temperature=0, max_tokens=6, stop="x"), use_tqdm=False)
    assert text == output.outputs[0].text
    assert max_length == SMALL["max_model_len"]


LANGCHAIN = f"""
from langchain_community.llms import VLLM

llm = VLLM(model=folder, temperature=0, max_new_tokens=6, dtype=small.pop("dtype"), vllm_kwargs=small)
print(json.dumps(llm.batch([{PREFIX!r}, "Hello"])))
"""


def test_langchain_gets_the_engines_texts(folder: Path, llm: LLM) -> None:
    texts = run_program("langchain_community", LANGCHAIN, folder)
    outputs = llm.generate([PREFIX, "Hello"], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    assert texts == [output.outputs[0].text for output in outputs]


OUTLINES = f"""
import outlines
from typing import Literal
from outlines.types import Regex
from vllm import LLM, SamplingParams

with LLM(folder, **small) as llm:
    model = outlines.from_vllm_offline(llm)
    params = SamplingParams(seed=1, max_tokens=24)
    texts = [model({PREFIX!r}, kind, sampling_params=params) for kind in (Literal["yes", "no"], Regex("[a-c]{{4,8}}"))]
    print(json.dumps(texts))
"""


def test_outlines_gets_the_forms_it_asks_for(folder: Path, llm: LLM) -> None:
    choice, word = run_program("outlines", OUTLINES, folder)
    assert choice in ("yes", "no") and re.fullmatch("[a-c]{4,8}", word)
    form = StructuredOutputsParams(regex="[a-c]{4,8}")
    params = SamplingParams(seed=1, max_tokens=24, structured_outputs=form)
    (output,) = llm.chat([{"role": "user", "content": PREFIX}], params, use_tqdm=False)
    assert word == output.outputs[0].text
