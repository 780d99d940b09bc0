"""delta: what is new in a request's output since an earlier one.

Outputs grow, so the difference of two of them is a piece of each list and text. Invariant: an earlier output and the
deltas after it add up to the latest one, however many were left out between.
"""

from copy import copy

from nanovllm.outputs import CompletionOutput, RequestOutput


def delta(output: RequestOutput, before: RequestOutput | None) -> RequestOutput:
    """Sequences without anything new are left out; the prompt's log-probabilities come with its first token."""
    new = copy(output)
    if before is None:
        new.outputs = [piece for piece in output.outputs if piece.token_ids or piece.finished()]
        return new
    pieces = [_piece(now, old) for now, old in zip(output.outputs, before.outputs, strict=True)]
    new.outputs = [piece for piece in pieces if piece is not None]
    if before.outputs[0].token_ids:
        new.prompt_logprobs = None
    return new


def _piece(now: CompletionOutput, old: CompletionOutput) -> CompletionOutput | None:
    num_tokens = len(old.token_ids)
    if old.finished() or (len(now.token_ids) == num_tokens and not now.finished()):
        return None
    piece = copy(now)  # a fifth of what dataclasses.replace takes, for each token of a stream
    piece.text = now.text[len(old.text) :]
    piece.token_ids = now.token_ids[num_tokens:]
    if now.logprobs is not None:
        piece.logprobs = now.logprobs[num_tokens:]
    return piece
