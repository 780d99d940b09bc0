"""vLLM's options that this engine does not have: the values that ask for nothing, and what the others would ask for.

Owns the table. A leaf: read only where an option is unknown. Invariant: a value is taken only where doing nothing is
what it asks for; any other is refused with what is missing, or what to use instead.
"""

from collections.abc import Mapping
from reprlib import repr as shorten
from typing import Any

_OFF = (None, False)
_ANY = None  # says how, where another option says whether

_LAUNCHER = "torchrun starts the ranks of several hosts; use distributed_executor_backend='external_launcher'"

_ABSENT: dict[str, dict[str, tuple[tuple[Any, ...] | None, str]]] = {
    "EngineConfig": {
        "trust_remote_code": (_OFF, "remote code is never run; leave it out"),
        "code_revision": ((None,), "remote code is never run"),
        "calculate_kv_scales": (_OFF, "a KV cache in 8 bits takes a scale for each token and head when it stores them"),
        "lora_dtype": ((None, "auto"), "adapters have the dtype of the model"),
        "fully_sharded_loras": (_OFF, "each matrix is split as its layer is, without further exchanges"),
        "default_mm_loras": ((None, {}), "only text is supported"),
        "pipeline_parallel_size": ((None, 1), "pipeline parallelism is not supported; use tensor_parallel_size"),
        "nnodes": ((None, 1), _LAUNCHER),
        "node_rank": ((None, 0), _LAUNCHER),
        "master_addr": (_ANY, ""),
        "master_port": (_ANY, ""),
        "enable_expert_parallel": (_OFF, "experts are split by tensor_parallel_size only"),
        "cpu_offload_gb": ((None, 0), "weights are not offloaded; use tensor_parallel_size or a smaller model"),
        "swap_space": ((None, 0, 4), "nothing is swapped: what is preempted is computed again"),
        "preemption_mode": ((None, "recompute"), "what is preempted is computed again"),
        "tokenizer_mode": ((None, "auto", "hf"), "there is one kind of tokenizer, transformers' fast ones"),
        "tokenizer_revision": ((None,), "a tokenizer is read at the model's revision"),
        "download_dir": ((None,), "downloads go where HF_HOME says"),
        "hf_token": (_OFF, "the Hub is asked with the token of HF_TOKEN or `hf auth login`"),
        "hf_overrides": ((None, {}), "a model is what its config.json says; edit a copy of it"),
        "hf_config_path": ((None,), "a model is what its config.json says; edit a copy of it"),
        "config_format": ((None, "auto", "hf"), "only config.json and GGUF files are read"),
        "rope_scaling": ((None, {}), "set rope scaling in the model's config.json"),
        "rope_theta": ((None,), "set rope_theta in the model's config.json"),
        "generation_config": ((None, "auto"), "the model's own gives defaults; pass SamplingParams"),
        "override_generation_config": ((None, {}), "pass SamplingParams"),
        "model_loader_extra_config": ((None, {}), "there is one way to load weights"),
        "ignore_patterns": ((None,), "only the files that are needed are downloaded"),
        "max_parallel_loading_workers": ((None,), "there is one way to load weights"),
        "model_impl": ((None, "auto", "vllm"), "models of transformers are not run; see `nanovllm models`"),
        "runner": ((None, "auto", "generate"), "pooling models are not supported; LLM.embed pools any model's states"),
        "task": ((None, "auto", "generate"), "pooling models are not supported"),
        "convert": ((None, "auto", "none"), "pooling models are not supported"),
        "pooler_config": ((None,), "pooling models are not supported"),
        "override_pooler_config": ((None,), "pooling models are not supported"),
        "limit_mm_per_prompt": ((None, {}), "only text is supported"),
        "mm_processor_kwargs": ((None, {}), "only text is supported"),
        "allowed_local_media_path": ((None, ""), "only text is supported"),
        "enable_prompt_embeds": (_OFF, "prompts are text or token ids"),
        "compilation_config": ((None, {}), "use compilation and enforce_eager"),
        "optimization_level": ((None,), "use compilation and enforce_eager"),
        "cuda_graph_sizes": ((None, []), "use enforce_eager"),
        "max_seq_len_to_capture": (_ANY, ""),
        "attention_backend": ((None,), "there is one for each device"),
        "async_scheduling": (_OFF, "use overlap_depth=2, the default on a GPU"),
        "scheduling_policy": ((None, "fcfs"), "requests run in the order of their arrival"),
        "scheduler_cls": ((None,), "there is one scheduler"),
        "worker_cls": ((None, "auto"), "there is one worker"),
        "worker_extension_cls": ((None, ""), "there is one worker; LLM.apply_model reaches its model"),
        "max_num_partial_prefills": ((None, 1), "prompts are computed in the order of their arrival"),
        "max_long_partial_prefills": ((None, 1), "prompts are computed in the order of their arrival"),
        "long_prefill_token_threshold": ((None, 0), "prompts are computed in the order of their arrival"),
        "disable_sliding_window": (_OFF, "windows are part of the model"),
        "prefix_caching_hash_algo": (_ANY, ""),
        "structured_outputs_config": ((None, {}), "forms are llguidance's"),
        "guided_decoding_backend": ((None, "auto", "guidance"), "forms are llguidance's"),
        "reasoning_parser": ((None, ""), "outputs are not parsed"),
        "kv_transfer_config": ((None,), "the KV cache stays on its device"),
        "kv_events_config": ((None,), "the KV cache tells nobody what it holds"),
        "served_model_name": ((None,), "it is an option of `nanovllm serve`"),
        "disable_log_stats": ((None, True), "statistics are not logged; LLM.get_metrics() has them"),
        "disable_log_requests": ((None, True), "requests are not logged"),
        "enable_log_requests": (_OFF, "requests are not logged"),
        "otlp_traces_endpoint": ((None,), "there are no traces; LLM.get_metrics() has the counters"),
        "collect_detailed_traces": ((None,), "there are no traces; LLM.get_metrics() has the counters"),
        "additional_config": ((None, {}), "there is nothing it could reach"),
    },
    "SamplingParams": {
        "best_of": ((None,), "all n outputs are returned; compare their cumulative_logprob"),
        "use_beam_search": (_OFF, "call LLM.beam_search"),
        "length_penalty": ((None, 1), "call LLM.beam_search"),
        "early_stopping": (_OFF, "call LLM.beam_search"),
        "guided_decoding": ((None,), "it is called structured_outputs"),
        "truncate_prompt_tokens": ((None,), "a prompt is computed whole; cut its token ids"),
        "flat_logprobs": (_OFF, "log-probabilities come as one dict for each token"),
        "skip_reading_prefix_cache": (_OFF, "use enable_prefix_caching=False, or LLM.reset_prefix_cache()"),
        "thinking_token_budget": ((None,), "thinking is not told apart; use max_tokens"),
        "repetition_detection": ((None,), "use repetition_penalty"),
        "extra_args": ((None, {}), "there is nothing they could reach"),
        "skip_clone": (_ANY, ""),
    },
    "SpeculativeConfig": {
        "suffix_decoding_max_cached_requests": ((None, 0), "places are looked up in the request's own tokens"),
        "rejection_sample_method": ((None, "standard", "strict"), "what is drawn decides, so tokens never change"),
        "disable_padded_drafter_batch": (_ANY, ""),
        "enforce_eager": (_ANY, ""),
        "parallel_drafting": (_OFF, "drafts of n-grams and suffixes are made at once"),
        "draft_tensor_parallel_size": ((None,), "the draft model is split as the model is"),
        "quantization": ((None,), "the draft model is as its checkpoint has it"),
        "max_model_len": (_ANY, ""),
    },
    "StructuredOutputsParams": {
        "structural_tag": ((None,), "forms that begin at a tag in the text are not supported; use grammar"),
    },
    "get_tokenizer": {
        "trust_remote_code": (_OFF, "remote code is never run"),
        "tokenizer_mode": ((None, "auto", "hf"), "there is one kind of tokenizer, transformers' fast ones"),
        "download_dir": ((None,), "downloads go where HF_HOME says"),
    },
    "LLM.generate": {
        "priority": ((None,), "requests run in the order of their arrival"),
        "tokenization_kwargs": ((None, {}), "tokenize the prompt yourself and pass its token ids"),
        "prompt_token_ids": ((None,), "give prompts as lists of token ids"),
    },
    "LLM.chat": {
        "chat_template_content_format": ((None, "auto"), "what a template reads is found out from the template"),
        "mm_processor_kwargs": ((None, {}), "only text is supported"),
        "tokenization_kwargs": ((None, {}), "use preprocess_chat and your own token ids"),
    },
}


def refuse_absent(owner: str, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError unless all of these are arguments of vLLM's method that ask for nothing."""
    for name in drop_absent(owner, arguments):
        raise TypeError(f"{owner} takes no argument {name!r}")


def drop_absent(owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those of vLLM that ask for nothing. Raises TypeError for one that asks for what is not here.

    owner: the name of the class that they are for.
    """
    kept = {}
    absent = _ABSENT.get(owner, {})
    for name, value in options.items():
        if name not in absent:
            kept[name] = value
            continue
        off, reason = absent[name]
        if off is not _ANY and value not in off:
            raise TypeError(f"{owner}: {name}={shorten(value)} is not supported: {reason}")
    return kept
