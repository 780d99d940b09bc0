"""The engines that can be measured, behind one call: run this workload, come back when every token is there.

Owns how each is set up fairly: the same checkpoint, dtype and device, greedy or sampled alike, EOS ignored. Those in a
process of their own are in `elsewhere.py`.
Invariant: `run` returns the seconds in which exactly `max_tokens` output tokens came to exist for every prompt, or
raises; a prefix cache holds nothing then but the workload's own prefix.
"""

import gc
from collections import Counter
from importlib.util import find_spec
from time import perf_counter
from typing import Any, Protocol

import torch
import transformers

from nanovllm import __version__
from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.roofline.model_size import model_size
from nanovllm.roofline.roofline import ModelSize
from nanovllm.sampling_params import SamplingParams
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm_bench.workload import Workload, check_counts


class BenchEngine(Protocol):
    name: str
    version: str

    def run(self, workload: Workload) -> float: ...

    def close(self) -> None: ...


def check_installed(name: str, nano_vllm_python: str | None) -> None:
    """Raises ImportError or ValueError, with the remedy, where the engine of this name cannot be measured here."""
    if name == "vllm" and find_spec("vllm") is None:
        raise ImportError("--compare vllm needs vLLM in this environment: pip install vllm")
    if name == "llama.cpp" and find_spec("llama_cpp") is None:
        raise ImportError("--compare llama.cpp needs its Python binding: pip install llama-cpp-python")
    if name == "nano-vllm" and nano_vllm_python is None:
        raise ValueError(
            "nano-vllm's module is called nanovllm too, so it needs an environment of its own: make one, run there "
            "pip install git+https://github.com/GeeeekExplorer/nano-vllm.git and name it here with "
            "--nano-vllm-python PATH/bin/python"
        )


class NanoVLLM:
    name = "nanovllm"
    version = __version__

    def __init__(self, model: str, options: dict[str, Any], needs_tokenizer: bool = False) -> None:
        self._llm = LLM(model, skip_tokenizer_init=not needs_tokenizer, **options)
        self.dtype = self._llm.model_config.dtype
        self.device = self._llm.config.device
        self.vocab_size = self._llm.model_config.vocab_size
        config = self._llm.config
        # Processes on one CPU share what it can do.
        on_gpu = self.device.startswith("cuda")
        self.num_devices = config.tensor_parallel_size * config.data_parallel_size if on_gpu else 1
        self._counters: Counter[str] = Counter()

    @property
    def llm(self) -> LLM:
        return self._llm

    def run(self, workload: Workload) -> float:
        params = [
            SamplingParams(
                n=workload.n, temperature=workload.temperature, max_tokens=count, ignore_eos=True, detokenize=False,
                **workload.asks,
            )
            for count in workload.max_tokens
        ]  # fmt: skip
        self._llm.reset_prefix_cache()
        if workload.prefix:
            self._llm.generate([workload.prefix], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        before = self._llm.get_metrics()
        start = perf_counter()
        if workload.streams:
            counts = self._streamed(workload, params)
        else:
            outputs = self._llm.generate(workload.prompts, params, use_tqdm=False)
            counts = [len(one.token_ids) for output in outputs for one in output.outputs]
        seconds = perf_counter() - start
        self._counters.update({name: value - before[name] for name, value in self._llm.get_metrics().items()})
        check_counts(self.name, workload, counts)
        return seconds

    def _streamed(self, workload: Workload, params: list[SamplingParams]) -> list[int]:
        """How many tokens of each output came, as its deltas have them."""
        counts: Counter[tuple[int, int]] = Counter()
        for output in self._llm.stream(workload.prompts, params):
            for one in output.outputs:
                counts[int(output.request_id), one.index] += len(one.token_ids)
        return [counts[key] for key in sorted(counts)]

    def generate(self, workload: Workload) -> list[list[int]]:
        """The tokens of a workload, greedily."""
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in workload.max_tokens]
        return [one.outputs[0].token_ids for one in self._llm.generate(workload.prompts, params, use_tqdm=False)]

    def counters(self) -> dict[str, float]:
        """The counters of `LLM.get_metrics()`, of what ran while a clock ran."""
        return dict(self._counters)

    def model_size(self) -> ModelSize:
        return model_size(self._llm.model_config, self._llm.config.quantization, self._llm.config.kv_cache_dtype)

    def close(self) -> None:
        self._llm.close()


class HuggingFace:
    """transformers' `generate` on all prompts as one left-padded batch, as long as the longest output needs."""

    name = "hf"
    version = transformers.__version__

    def __init__(self, model: str, options: dict[str, Any], dtype: str, device: str) -> None:
        self._device = torch.device(device)
        self._model = load_hugging_face(EngineConfig(model=model, **options), dtype).to(self._device)
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # without an EOS token

    @torch.inference_mode()
    def run(self, workload: Workload) -> float:
        longest = max(map(len, workload.prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in workload.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in workload.prompts])
        num_new = max(workload.max_tokens)
        sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0} if workload.temperature else {}
        start = perf_counter()
        output = self._model.generate(
            input_ids.to(self._device), attention_mask=mask.to(self._device), max_new_tokens=num_new, **sampling
        )
        num_made = output.cpu().shape[1] - longest
        seconds = perf_counter() - start
        counts = [min(num_made, count) for count in workload.max_tokens]
        check_counts(self.name, workload, counts)
        return seconds

    def close(self) -> None:
        del self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class VLLM:
    name = "vllm"

    def __init__(self, model: str, options: dict[str, Any], dtype: str) -> None:
        import vllm  # not a dependency: only who compares with it has it

        self.version = vllm.__version__
        shared = {
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "gpu_memory_utilization",
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "enforce_eager",
            "tensor_parallel_size",
            "seed",
            "revision",
        }
        arguments = {name: value for name, value in options.items() if name in shared}
        if options.get("load_format") == "dummy":
            arguments["load_format"] = "dummy"
        self._vllm = vllm
        self._llm = vllm.LLM(model, dtype=dtype, skip_tokenizer_init=True, **arguments)

    def run(self, workload: Workload) -> float:
        params = [
            self._vllm.SamplingParams(
                temperature=workload.temperature, max_tokens=count, ignore_eos=True, detokenize=False
            )
            for count in workload.max_tokens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        self._llm.reset_prefix_cache()
        if workload.prefix:
            self._llm.generate([{"prompt_token_ids": workload.prefix}], params[0], use_tqdm=False)
        start = perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = perf_counter() - start
        check_counts(self.name, workload, [len(output.outputs[0].token_ids) for output in outputs])
        return seconds

    def close(self) -> None:
        del self._llm
        gc.collect()


def load_hugging_face(config: EngineConfig, dtype: str) -> Any:
    """transformers' model with the weights of our checkpoint, in eval mode on the CPU; random ones for "dummy"."""
    checkpoint = open_checkpoint(config.model, load_format=config.load_format, revision=config.revision)
    fields = {name: value for name, value in checkpoint.config.items() if name != "model_type"}
    hf_config = transformers.AutoConfig.for_model(checkpoint.config["model_type"], **fields)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
    if config.load_format != "dummy":
        missing, unexpected = model.load_state_dict(dict(checkpoint.tensors(getattr(torch, dtype))), strict=False)
        missing = [name for name in missing if not (name == "lm_head.weight" and hf_config.tie_word_embeddings)]
        if missing or unexpected:
            raise ValueError(f"{config.model}: Hugging Face's model misses {missing} and does not know {unexpected}")
        model.tie_weights()
    return model.eval()
