"""The engines that can be measured, behind one call: run this workload, come back when every token is there.

Owns how each engine is set up fairly: the same checkpoint, dtype and device, greedy or sampled alike, EOS ignored.
Invariant: `run` returns only after exactly `max_tokens` output tokens exist for every prompt, or raises.
"""

import gc
from typing import Any, Protocol

import torch
import transformers

from nanovllm import __version__
from nanovllm.bench.workload import Workload
from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.weights.checkpoint import open_checkpoint


class BenchEngine(Protocol):
    name: str
    version: str

    def run(self, workload: Workload) -> None: ...

    def close(self) -> None: ...


class NanoVLLM:
    name = "nanovllm"
    version = __version__

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._llm = LLM(model, skip_tokenizer_init=True, **options)
        self.dtype = self._llm.model_config.dtype
        self.device = self._llm.config.device
        self.vocab_size = self._llm.model_config.vocab_size

    def run(self, workload: Workload) -> None:
        params = [
            SamplingParams(temperature=workload.temperature, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in workload.max_tokens
        ]
        outputs = self._llm.generate(workload.prompts, params, use_tqdm=False)
        _check_counts(self.name, workload, [len(output.outputs[0].token_ids) for output in outputs])

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
    def run(self, workload: Workload) -> None:
        longest = max(map(len, workload.prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in workload.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in workload.prompts])
        num_new = max(workload.max_tokens)
        sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0} if workload.temperature else {}
        output = self._model.generate(
            input_ids.to(self._device), attention_mask=mask.to(self._device), max_new_tokens=num_new, **sampling
        )
        num_made = output.cpu().shape[1] - longest
        counts = [min(num_made, count) for count in workload.max_tokens]
        _check_counts(self.name, workload, counts)

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
            "seed",
            "revision",
        }
        arguments = {name: value for name, value in options.items() if name in shared}
        if options.get("load_format") == "dummy":
            arguments["load_format"] = "dummy"
        self._vllm = vllm
        self._llm = vllm.LLM(model, dtype=dtype, skip_tokenizer_init=True, **arguments)

    def run(self, workload: Workload) -> None:
        params = [
            self._vllm.SamplingParams(
                temperature=workload.temperature, max_tokens=count, ignore_eos=True, detokenize=False
            )
            for count in workload.max_tokens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        _check_counts(self.name, workload, [len(output.outputs[0].token_ids) for output in outputs])

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
        missing, unexpected = model.load_state_dict(dict(checkpoint.tensors()), strict=False)
        missing = [name for name in missing if not (name == "lm_head.weight" and hf_config.tie_word_embeddings)]
        if missing or unexpected:
            raise ValueError(f"{config.model}: Hugging Face's model misses {missing} and does not know {unexpected}")
        model.tie_weights()
    return model.eval()


def _check_counts(name: str, workload: Workload, counts: list[int]) -> None:
    if counts != workload.max_tokens:
        raise RuntimeError(f"{name} made {sum(counts)} tokens where the workload asks for {workload.num_output_tokens}")
