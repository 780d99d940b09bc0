"""get_tokenizer, where vLLM has it: the Hugging Face tokenizer of a model, without the model."""

from typing import Any

from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.vllm_options import refuse_absent


def get_tokenizer(tokenizer_name: str, *, revision: str | None = None, **absent: Any) -> Any:
    """tokenizer_name: what `LLM` takes as a model. Raises ValueError or ConnectionError if it cannot be loaded."""
    refuse_absent("get_tokenizer", absent)
    return load_tokenizer(str(tokenizer_name), revision=revision).hf
