"""What programs written for vLLM ask of an LLM object, asked of this one (the programs: tests/integrations)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, CompletionOutput, SamplingParams, TextPrompt, TokensPrompt
from tests.llm_checks import check_nothing_is_left
from tests.tiny_models import save_scripted

TEXT = "Grü, WORLD!"
GREEDY = SamplingParams(temperature=0, max_tokens=4)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scripted(tmp_path_factory.mktemp("scripted"), TEXT, ends=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(folder, dtype="float32", device="cpu", max_model_len=200, kv_cache_memory_bytes=10_000_000) as llm:
        yield llm


def test_prompts_as_dicts(llm: LLM) -> None:
    prompts = [TextPrompt(prompt="Hi"), TokensPrompt(prompt_token_ids=[72, 105], prompt="Hi")]
    text, ids = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert (text.prompt, ids.prompt) == ("Hi", "Hi")
    assert text.prompt_token_ids[-2:] == ids.prompt_token_ids == [72, 105]


def test_arguments_that_ask_for_nothing_are_taken_and_others_named(llm: LLM) -> None:
    nothing: dict[str, Any] = {"lora_request": None, "tokenization_kwargs": None}
    assert llm.generate("Hi", GREEDY, use_tqdm=False, priority=None, **nothing)
    assert llm.chat(HELLO, GREEDY, use_tqdm=False, chat_template_content_format="auto", **nothing)
    with pytest.raises(TypeError, match=r"lora_request must be a LoRARequest"):
        llm.generate("Hi", GREEDY, use_tqdm=False, lora_request=object())
    with pytest.raises(TypeError, match="content_format='openai' is not supported"):
        llm.chat(HELLO, GREEDY, use_tqdm=False, chat_template_content_format="openai")
    for call in (llm.generate, llm.chat, llm.enqueue):
        with pytest.raises(TypeError, match="no argument 'temprature'"):
            call(HELLO, GREEDY, temprature=1)  # type: ignore[operator]
    check_nothing_is_left(llm)


# -- chat --


def test_an_answer_has_the_text_of_its_prompt(llm: LLM) -> None:
    (output,) = llm.chat(HELLO, GREEDY, use_tqdm=False)
    (prompt,) = llm.preprocess_chat(HELLO)
    assert output.prompt == prompt["prompt"] and "Hello" in prompt["prompt"]
    assert output.prompt_token_ids == prompt["prompt_token_ids"]
    assert llm.get_tokenizer().encode(output.prompt, add_special_tokens=False) == output.prompt_token_ids


def prompt_text(llm: LLM, messages: Any, **options: Any) -> str:
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False, **options)
    assert output.prompt is not None
    return output.prompt


def test_chat_takes_what_vllm_takes(llm: LLM) -> None:
    plain = prompt_text(llm, HELLO)
    assert prompt_text(llm, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]) == plain
    begun = [*HELLO, {"role": "assistant", "content": "Sure, the"}]
    assert prompt_text(llm, begun, add_generation_prompt=False, continue_final_message=True).endswith("Sure, the")
    template = "{{ messages[0].content }}{% for tool in tools or [] %} {{ tool.function.name }}{% endfor %}{{ more }}"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert prompt_text(llm, HELLO, chat_template=template) == "Hello"
    assert prompt_text(llm, HELLO, chat_template=template, tools=tools) == "Hello add"
    assert prompt_text(llm, HELLO, chat_template_kwargs={"chat_template": template, "more": "!"}) == "Hello!"


@pytest.mark.parametrize(
    ("messages", "error", "named"),
    [
        ("Hello", TypeError, "messages must be a list"),
        ({"role": "user", "content": "Hello"}, TypeError, "messages must be a list"),
        ([], ValueError, "messages"),
        ([{"content": "Hi"}], ValueError, r"messages\[0\].*role"),
        ([HELLO, [{"content": "Hi"}]], ValueError, r"messages\[1\]\[0\].*role"),
    ],
)
def test_a_message_that_is_none_is_named(llm: LLM, messages: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        llm.chat(messages, GREEDY, use_tqdm=False)
    check_nothing_is_left(llm)


# -- queue now, run later --


def test_what_is_queued_comes_back_in_its_order(llm: LLM) -> None:
    long, short = SamplingParams(temperature=0, max_tokens=9), SamplingParams(temperature=0, max_tokens=2)
    ids = llm.enqueue(["a", "b"], [long, short]) + llm.enqueue("c", short)
    assert llm.has_unfinished_requests()
    beside = llm.generate("d", GREEDY, use_tqdm=False)  # other calls are not disturbed, and may do the work
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 2, 2]
    assert len(beside) == 1 and llm.wait_for_completion(use_tqdm=False) == []
    check_nothing_is_left(llm)


def test_a_bad_prompt_queues_nothing(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        llm.enqueue(["a", ""], GREEDY)
    assert llm.wait_for_completion(use_tqdm=False) == []
    check_nothing_is_left(llm)


def test_an_interrupted_wait_may_be_made_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = llm.enqueue(["a", "b"], [SamplingParams(temperature=0, max_tokens=count) for count in (2, 6)])
    wait, calls = llm._session.wait, []

    def interrupted(inbox: Any) -> None:
        calls.append(inbox)
        if len(calls) == 2:
            raise KeyboardInterrupt
        wait(inbox)

    monkeypatch.setattr(llm._session, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.wait_for_completion(use_tqdm=False)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    check_nothing_is_left(llm)


def test_an_aborted_one_comes_back_as_that(llm: LLM) -> None:
    first, second = llm.enqueue(["a", "b"], GREEDY)
    llm.abort_request(first)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [(output.request_id, output.outputs[0].finish_reason) for output in outputs] == [
        (first, "abort"),
        (second, "length"),
    ]


# -- what wrappers read --


def test_the_engine_as_wrappers_read_it(llm: LLM, folder: Path) -> None:
    model_config = llm.llm_engine.model_config
    assert model_config.max_model_len == 200 and model_config.dtype == "float32"
    assert model_config.model == model_config.tokenizer == str(folder)
    assert model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert model_config.hf_text_config.vocab_size == model_config.get_vocab_size()
    assert llm.llm_engine.get_tokenizer() is llm.get_tokenizer()
    said = "device='cpu', dtype='float32', quantization=None, kv_cache_dtype='auto', max_model_len=200"
    assert repr(llm).startswith(f"LLM({str(folder)!r}, {said}, num_kv_cac")


def test_an_output_says_whether_it_is_finished() -> None:
    assert not CompletionOutput().finished() and CompletionOutput(finish_reason="stop").finished()


def test_parameters_can_be_copied_field_by_field() -> None:
    params = SamplingParams(seed=3, stop="a")
    names = params.__struct_fields__
    assert {"temperature", "structured_outputs"} <= set(names) == set(SamplingParams.__annotations__)
    assert SamplingParams(**{name: getattr(params, name) for name in names}) == params


@pytest.mark.parametrize("name", ["encode", "classify", "reward", "start_profile"])
def test_what_is_not_here_is_refused_by_name(llm: LLM, name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"LLM\.{name} is not supported: "):
        getattr(llm, name)("Hi", level=2)


def test_more_log_probabilities_than_the_engine_allows_are_refused(folder: Path) -> None:
    with LLM(folder, device="cpu", max_model_len=64, kv_cache_memory_bytes=10_000_000, max_logprobs=3) as llm:
        for options in ({"logprobs": 4}, {"logprobs": -1}, {"prompt_logprobs": 4}):
            with pytest.raises(
                ValueError, match=r"prompts\[0\]: (prompt_)?logprobs=-?\d asks for more than max_logprobs=3"
            ):
                llm.generate("Hi", SamplingParams(**options), use_tqdm=False)
        (output,) = llm.generate("Hi", SamplingParams(logprobs=3, prompt_logprobs=0), use_tqdm=False)
        assert output.outputs[0].logprobs is not None


# -- under vLLM's name --

AS_VLLM = """
import nanovllm.as_vllm
from importlib.metadata import version
from importlib.util import find_spec
import nanovllm, vllm
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams
from vllm.lora.request import LoRARequest
from vllm.tokenizers import get_tokenizer
from vllm.renderers.hf import resolve_chat_template
assert LLM is nanovllm.LLM and find_spec("vllm") and version("vllm") == vllm.__version__
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
import vllm.entrypoints.openai.api_server
assert AsyncEngineArgs is vllm.AsyncEngineArgs and find_spec("vllm.nothing") is None
try:
    vllm.PoolingParams
except AttributeError as error:
    assert "vllm.PoolingParams" in str(error)
assert LoRARequest("a", 1, "b").lora_path == "b"
print("done")
"""


def test_programs_find_the_engine_under_vllms_name() -> None:
    result = subprocess.run([sys.executable, "-c", AS_VLLM], capture_output=True, text=True, check=False)
    assert result.stdout == "done\n", result.stderr


def test_an_installed_vllm_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import nanovllm.as_vllm"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: vllm is installed here" in result.stderr


def test_a_module_is_run_with_vllms_name(tmp_path: Path) -> None:
    (tmp_path / "written_for_vllm.py").write_text(
        "import sys, vllm; print(vllm.SamplingParams.__module__, sys.argv[1:])"
    )
    command = [sys.executable, "-m", "nanovllm.as_vllm", "written_for_vllm", "--model", "x"]
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{root}"}
    )
    assert result.stdout == "nanovllm.sampling_params ['--model', 'x']\n"
