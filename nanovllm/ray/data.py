"""NanoBatch: an engine as a class for Ray Data's `Dataset.map_batches`, with the columns of `ray.data.llm`.

Owns rows in, rows out. Which batches are in flight, retries and checkpoints are Ray's. Invariant: what comes of a row
depends on the row alone, and on the model; so it does not matter which actor computes it, beside what, or how often.

An engine that has failed takes its actor along: a task is tried again on the actor that it failed on, for ever, unless
that process is gone.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from nanovllm.async_llm import AsyncLLM
from nanovllm.batch.columns import PARAMS_COLUMN, params_over, read_params
from nanovllm.errors import RequestError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

INPUTS = ("tokenized_prompt", "messages", "prompt")  # the first of them that a row has is asked
_MISTAKES = (ValueError, TypeError, NotImplementedError, RequestError)  # of a row


class NanoBatch:
    """dataset.map_batches(NanoBatch, num_gpus=1, batch_size=64, fn_constructor_kwargs={"model": ..., ...})

    Rows have a column `prompt`, `messages` or `tokenized_prompt`, and may have one `sampling_params`, an object. They
    get `generated_text`, `generated_tokens`, `num_input_tokens`, `num_generated_tokens`, `finish_reason` and
    `__inference_error__`, which is empty where all went well.
    """

    def __init__(
        self,
        model: str,
        sampling_params: Mapping[str, Any] | SamplingParams | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
        id_column: str | None = None,
        should_continue_on_error: bool = False,
    ) -> None:
        """sampling_params: of every row, before its own. engine_kwargs: options of `LLM`. id_column: what seeds are
        made of, for rows without a seed; by default the prompt, so that equal prompts get equal answers.
        should_continue_on_error: a row that cannot be computed says why, in its `__inference_error__`; else the job
        ends.
        """
        self._engine = AsyncLLM(model, **{"use_tqdm_on_load": False, **(engine_kwargs or {})})
        if sampling_params is None:
            sampling_params = self._engine.llm.get_default_sampling_params()
        if not isinstance(sampling_params, SamplingParams):
            sampling_params = SamplingParams(**sampling_params)
        self._params = replace(sampling_params, output_kind=RequestOutputKind.FINAL_ONLY)
        self._id_column = id_column
        self._continues = should_continue_on_error

    async def __call__(self, batch: Any) -> Any:
        """batch: columns, as NumPy arrays or a pyarrow Table. Returns a pyarrow Table."""
        import pyarrow  # Ray Data needs it, too

        table = pyarrow.table({name: list(column) for name, column in batch.items()}) if _is_mapping(batch) else batch
        results = await asyncio.gather(*map(self._answer, table.to_pylist()))
        kinds = {str: pyarrow.string(), int: pyarrow.int64(), list: pyarrow.list_(pyarrow.int64())}
        for name, kind in _COLUMNS.items():
            column = pyarrow.array([result[name] for result in results], kinds[kind])
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table

    async def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        output: RequestOutput | None = None
        try:
            prompt = await self._prompt_of(row)
            async for final in self._engine.generate(prompt, self._params_of(row, prompt)):
                output = final
        except _MISTAKES as error:
            if not self._continues:
                raise
            return _result(None, f"{type(error).__name__}: {error}")
        except RuntimeError as error:
            print(f"the engine of this actor has ended, and so the actor does: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        return _result(output, "")

    async def _prompt_of(self, row: Mapping[str, Any]) -> Any:
        name = next((name for name in INPUTS if row.get(name) is not None), None)
        if name is None:
            raise ValueError(f"a row needs one of the columns {', '.join(INPUTS)}; this one has {', '.join(row)}")
        if name == "messages":
            (prompt,) = await asyncio.to_thread(self._engine.llm.preprocess_chat, row["messages"])
            return prompt
        return row[name]

    def _params_of(self, row: Mapping[str, Any], prompt: Any) -> SamplingParams:
        told = repr(prompt if self._id_column is None else row[self._id_column])
        seed = blake2b(f"{self._engine.llm.config.seed} {told}".encode(errors="surrogatepass"), digest_size=7).digest()
        own = read_params(row.get(PARAMS_COLUMN) or {})
        return params_over(self._params, own, int.from_bytes(seed, "little"))


_COLUMNS: Mapping[str, type] = {
    "generated_text": str,
    "generated_tokens": list,
    "num_input_tokens": int,
    "num_generated_tokens": int,
    "finish_reason": str,
    "__inference_error__": str,
}


def _result(output: RequestOutput | None, error: str) -> dict[str, Any]:
    if output is None:
        return dict(zip(_COLUMNS, ("", [], 0, 0, "error", error), strict=True))
    answer = output.outputs[0]
    counts = len(output.prompt_token_ids), len(answer.token_ids)
    return dict(zip(_COLUMNS, (answer.text, list(answer.token_ids), *counts, answer.finish_reason, error), strict=True))


def _is_mapping(batch: Any) -> bool:
    return isinstance(batch, Mapping)
