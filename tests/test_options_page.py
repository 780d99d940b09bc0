"""docs/options.md says what the options are: it is written from the code.

python -m tests.test_options_page
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from nanovllm.cli.options import field_docs
from nanovllm.config import EngineConfig
from nanovllm.options import accepts
from nanovllm.sampling_params import SamplingParams

DOCS = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """\
# Options

Names and meanings are vLLM's where it has them. An unknown name is an error that suggests the nearest one; a value out
of range is an error that says the range. This page is written from the code (`python -m tests.test_options_page`).

"""
OWNERS: list[tuple[str, str, type]] = [
    ("LLM(model, ...)", "Most are flags of the commands as well (`--max-model-len`).", EngineConfig),
    ("SamplingParams(...)", "What one request asks for.", SamplingParams),
]


def make_page() -> str:
    parts = [HEAD]
    for title, text, owner in OWNERS:
        docs = field_docs(owner)
        rows = [f"| `{field.name}` | {show(field)} | {docs[field.name]} |" for field in fields(owner)]
        parts.append(f"## {title}\n\n{text}\n\n| option | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows))
        parts.append("\n\n")
    return "".join(parts).rstrip() + "\n"


def show(field: Any) -> str:
    if field.default is MISSING:
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    value = field.default.name if hasattr(field.default, "name") else field.default
    choices = [choice for choice in accepts(field).choices if choice is not None]
    values = " (" + ", ".join(f"`{choice!r}`" for choice in choices) + ")" if choices else ""
    return f"`{value!r}`{values}".replace("|", "\\|")


def test_the_page_is_what_the_code_says() -> None:
    assert DOCS.read_text() == make_page(), "docs/options.md is out of date: python -m tests.test_options_page"


def test_every_option_is_explained() -> None:
    assert all(text for _, _, owner in OWNERS for text in field_docs(owner).values())


if __name__ == "__main__":
    DOCS.write_text(make_page())
