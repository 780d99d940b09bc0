"""show_progress: a bar over the prompts of `LLM.generate`, with prompt and output tokens a second.

Owns what the bar says. Invariant: it changes nothing of what passes, and is gone when the last has passed.
"""

import time
from collections.abc import Generator, Hashable, Iterator
from contextlib import closing
from typing import TypeVar

from tqdm import tqdm

from nanovllm.outputs import RequestOutput

Key = TypeVar("Key", bound=Hashable)


def show_progress(
    outputs: Generator[tuple[Key, RequestOutput], None, None], total: int
) -> Iterator[tuple[Key, RequestOutput]]:
    """The same outputs, counted as they come, and closed at the end. total: how many there will be."""
    start = time.perf_counter()
    num_prompt_tokens = num_output_tokens = 0
    with closing(outputs), tqdm(total=total, desc="Generating", unit=" prompts", dynamic_ncols=True) as bar:
        for key, output in outputs:
            num_prompt_tokens += len(output.prompt_token_ids)
            num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            seconds = time.perf_counter() - start
            bar.set_postfix_str(
                f"prompt {num_prompt_tokens / seconds:.0f} tok/s, output {num_output_tokens / seconds:.0f} tok/s",
                refresh=False,
            )
            bar.update()
            yield key, output
