"""`import nanovllm.as_vllm`: programs that are written for vLLM find this engine under that name.

    python -m nanovllm.as_vllm lm_eval --model vllm --model_args pretrained=MODEL --tasks ...

Owns which of vLLM's modules there are, and what stands in each. Invariant: where vLLM itself is installed, nothing of
it is hidden: the import raises ImportError.
"""

import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

VERSION = "0.33.0"  # of vLLM, whose names these are

# module -> the modules here that have its names
_MODULES: dict[str, tuple[str, ...]] = {
    "vllm": ("nanovllm",),
    "vllm.sampling_params": ("nanovllm",),
    "vllm.outputs": ("nanovllm",),
    "vllm.inputs": ("nanovllm",),
    "vllm.logprobs": ("nanovllm",),
    "vllm.engine": (),
    "vllm.engine.arg_utils": ("nanovllm.engine_args",),
    "vllm.engine.async_llm_engine": ("nanovllm.engine_args",),
    "vllm.entrypoints": (),
    "vllm.entrypoints.llm": ("nanovllm",),
    "vllm.entrypoints.openai": (),
    "vllm.entrypoints.openai.api_server": ("nanovllm.entrypoints.openai.api_server",),
    "vllm.lora": (),
    "vllm.lora.request": ("nanovllm.lora.request",),
    "vllm.tokenizers": ("nanovllm.tokenizers",),
    "vllm.renderers": (),
    "vllm.renderers.hf": ("nanovllm.as_vllm",),
}


def resolve_chat_template(tokenizer: Any, chat_template: str | None, tools: Any, *, model_config: Any) -> str | None:
    """The template that a conversation would be laid out by, as a Hugging Face tokenizer chooses it."""
    if chat_template is None and tokenizer.chat_template is None:
        return None
    template: str = tokenizer.get_chat_template(chat_template, tools=tools)
    return template


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        for source in _MODULES[self.__name__]:
            if not name.startswith("_") and hasattr(import_module(source), name):
                return getattr(import_module(source), name)
        raise AttributeError(f"nanovllm has nothing for {self.__name__}.{name}")


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm":
            module.__version__ = VERSION  # type: ignore[attr-defined]


class _Metadata(Distribution):
    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


class _Finder(DistributionFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _MODULES:
            return None
        is_package = any(other.startswith(f"{name}.") for other in _MODULES)
        return spec_from_loader(name, _Loader(), origin="nanovllm", is_package=is_package)

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        if context is None or context.name in (None, "vllm"):
            yield _Metadata()


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    if find_spec("vllm") is not None:
        raise ImportError(
            "vllm is installed here, and programs that import it get it: nanovllm does not take its place"
        )
    sys.meta_path.append(_Finder())

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m nanovllm.as_vllm MODULE [ARGUMENT ...]")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
