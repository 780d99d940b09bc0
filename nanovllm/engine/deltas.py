"""delta: what is new in a request's output since an earlier one.

Outputs grow, so the difference of two of them is a piece of each list and text. Invariant: an earlier output and the
deltas after it add up to the latest one, however many were left out between.
"""

from dataclasses import replace

from nanovllm.outputs import CompletionOutput, RequestOutput


def delta(output: RequestOutput, before: RequestOutput | None) -> RequestOutput:
    """Sequences without anything new are left out; the prompt's log-probabilities come with its first token."""
    if before is None:
        return replace(output, outputs=[new for new in output.outputs if new.token_ids or new.finished()])
    pieces = [_piece(new, old) for new, old in zip(output.outputs, before.outputs, strict=True)]
    is_prompt_known = bool(before.outputs[0].token_ids)
    return replace(
        output,
        outputs=[piece for piece in pieces if piece is not None],
        prompt_logprobs=None if is_prompt_known else output.prompt_logprobs,
    )


def _piece(new: CompletionOutput, old: CompletionOutput) -> CompletionOutput | None:
    if old.finished() or (len(new.token_ids) == len(old.token_ids) and not new.finished()):
        return None
    num_tokens = len(old.token_ids)
    return replace(
        new,
        text=new.text[len(old.text) :],
        token_ids=new.token_ids[num_tokens:],
        logprobs=None if new.logprobs is None else new.logprobs[num_tokens:],
    )
