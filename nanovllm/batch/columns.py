"""Tables of prompts or conversations: which column holds what, and the columns that a result adds.

Owns the meaning of columns. Invariant: whatever is wrong with one row ends in its `error` column, and never in an
exception; a result holds nothing that depends on what else ran, such as times or prefix hits.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.async_llm import AsyncLLM
from nanovllm.batch.tables import Row
from nanovllm.errors import RequestError, brief
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams

NEW_COLUMNS: Mapping[str, type] = {
    "generated_text": str,
    "finish_reason": str,
    "num_prompt_tokens": int,
    "num_generated_tokens": int,
    "error": str,
}
PARAMS_COLUMN = "sampling_params"
_NOT_IN_A_COLUMN = ("n", "logprobs", "prompt_logprobs", "capture", "detokenize", "output_kind", "logits_processors")


@dataclass(frozen=True)
class Columns:
    """name: of the column that is asked. is_chat: it holds messages, and no prompt."""

    name: str
    is_chat: bool


def find_columns(first: Mapping[str, Any], prompt_column: str | None, messages_column: str | None) -> Columns:
    """first: a row. Raises ValueError for a column that is not there, or that a result would hide."""
    if prompt_column is not None and messages_column is not None:
        raise ValueError("give --prompt-column or --messages-column, not both")
    given = messages_column or prompt_column
    if given is not None and given not in first:
        raise ValueError(f"the input has no column {given!r}; it has {', '.join(map(repr, first))}")
    name = given or next((name for name in ("prompt", "messages") if name in first), None)
    if name is None:
        raise ValueError(
            "the input has no column 'prompt' or 'messages': say which one is it with --prompt-column or "
            f"--messages-column. It has {', '.join(map(repr, first))}"
        )
    for column in NEW_COLUMNS:
        if column in first:
            raise ValueError(f"the input has a column {column!r}, which results are written to: rename it")
    return Columns(name, is_chat=messages_column is not None or (given is None and name == "messages"))


class ColumnsJob:
    """Answers rows of a table. params: of every row, before its own."""

    def __init__(self, engine: AsyncLLM, columns: Columns, params: SamplingParams) -> None:
        self._llm, self._engine = engine.llm, engine
        self._columns = columns
        self._params = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)

    async def answer(self, row: Row) -> dict[str, Any]:
        if row.problem is not None:
            return _result(error=row.problem)
        output: RequestOutput | None = None
        try:
            params = self._params_of(row)
            prompt = await self._prompt_of(row)
            async for final in self._engine.generate(prompt, params):
                output = final
        except (ValueError, TypeError, NotImplementedError, RequestError) as error:
            return _result(output, str(error))
        return _result(output)

    async def _prompt_of(self, row: Row) -> Any:
        name = self._columns.name
        if name not in row.fields:
            raise ValueError(f"this row has no column {name!r}")
        value = row.fields[name]
        if self._columns.is_chat:
            messages = _from_json(name, value) if isinstance(value, str) else value
            (prompt,) = await asyncio.to_thread(self._llm.preprocess_chat, messages)
            return prompt
        if not isinstance(value, (str, list)):
            raise TypeError(f"{name} must be a text or a list of token ids, got {brief(value)}")
        return value

    def _params_of(self, row: Row) -> SamplingParams:
        """The row's own parameters over those of all rows; without a seed, that of the row's number."""
        own = row.fields.get(PARAMS_COLUMN) or {}
        own = _from_json(PARAMS_COLUMN, own) if isinstance(own, str) else own
        return params_over(self._params, read_params(own), row_seed(self._engine, row))

    def merge(self, row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
        return {**row.fields, **result}


def read_params(given: Any) -> dict[str, Any]:
    """What a row's column of parameters says, as it comes from JSON or Arrow. Raises TypeError, ValueError."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{PARAMS_COLUMN} must be an object, got {brief(given)}")
    own = {name: value for name, value in given.items() if value is not None}  # Arrow has every name in every row
    for name in _NOT_IN_A_COLUMN:
        if name in own:
            raise ValueError(f"{PARAMS_COLUMN} has {name!r}, which has no column for its result")
    if isinstance(own.get("logit_bias"), Mapping):
        own["logit_bias"] = {int(token_id): bias for token_id, bias in own["logit_bias"].items() if bias is not None}
    if isinstance(own.get("structured_outputs"), Mapping):
        forms = {name: form for name, form in own["structured_outputs"].items() if form is not None}
        own["structured_outputs"] = StructuredOutputsParams(**forms)
    return own


def params_over(params: SamplingParams, own: Mapping[str, Any], seed: int) -> SamplingParams:
    """own: what a row says itself, over the params of all rows. seed: of a row for which neither names one."""
    given = {name: value for name, value in vars(params).items() if name not in own}
    if own.get("seed", given.get("seed")) is None:
        given["seed"] = seed
    return SamplingParams(**given, **own)


def row_seed(engine: AsyncLLM, row: Row) -> int:
    """What `LLM.generate` draws with for the prompt of that number in its first call."""
    return engine.llm._input_processor.request_seed(row.number)


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}; got {brief(text)}") from error


def _result(output: RequestOutput | None = None, error: str | None = None) -> dict[str, Any]:
    if output is None:
        return {**dict.fromkeys(NEW_COLUMNS), "error": error}
    completion = output.outputs[0]
    return {
        "generated_text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_generated_tokens": len(completion.token_ids),
        "error": error,
    }
