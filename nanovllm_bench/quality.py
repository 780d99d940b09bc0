"""`nanovllm bench quality`: what fewer bits cost, beside the model as its checkpoint has it.

Owns the comparison of distributions over a text: perplexity, mean Kullback-Leibler divergence from the plain model and
how often the likeliest token is the same. Invariant: all forms read the same tokens, cut into the same windows, and
none is compared on a token without context.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm import __version__
from nanovllm.cli.memory import count_parameters
from nanovllm.cli.options import engine_options
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm_bench.arguments import CACHE_FORMS, FORMS
from nanovllm_bench.report import print_record, print_table

TEXT = Path(__file__).with_name("quality.txt")
PLAIN = "plain"  # the model as its checkpoint has it
_ROWS_AT_ONCE = 64  # of logits

_COLUMNS = {
    "form": "form",
    "weights, MB": "weights_megabytes",
    "perplexity": "perplexity",
    "to plain": "perplexity_ratio",
    "mean KL, nats": "mean_kl",
    "same greedy token": "agreement",
}


class Sums(NamedTuple):
    """Over tokens: -log p of the text's, KL from the plain model, how often the likeliest is the plain model's."""

    tokens: int
    surprise: float
    divergence: float
    agreed: int


def run(args: Namespace) -> int:
    for name, value, low in (("--window", args.window, 2), ("--windows", args.windows, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    options = engine_options(args)
    text = (TEXT if args.text is None else Path(args.text)).read_text(encoding="utf-8")
    forms = [form for form in args.forms or _forms(args.model) if form != PLAIN]
    plain: list[Tensor] = []
    rows = []
    for form in (PLAIN, *forms):
        with LLM(args.model, **options, **_options(form)) as llm:
            windows = cut(llm.get_tokenizer().encode(text), args.window, args.windows)
            sums = [measure(llm, window, plain, number) for number, window in enumerate(windows)]
            _, weight_bytes = count_parameters(llm.model_config, llm.config.quantization)
        rows.append(_row(form, weight_bytes, Sums(*map(sum, zip(*sums, strict=True)))))
    for row in rows:
        row["perplexity_ratio"] = row["perplexity"] / rows[0]["perplexity"]
    print_table(rows, _COLUMNS)
    print_record(args, {"options": options, "text": str(args.text or TEXT.name), "results": rows})
    return 0


def _forms(model: str) -> list[str]:
    is_gguf = model == "demo" or ".gguf" in model
    return [form for form in FORMS if form != "gguf" or is_gguf]


def _options(form: str) -> dict[str, Any]:
    """Of the engine: what makes this form."""
    quantization = None if form in (PLAIN, *CACHE_FORMS) else form
    return {"quantization": quantization, "kv_cache_dtype": CACHE_FORMS.get(form, "auto")}


def cut(token_ids: Sequence[int], window: int, most: int) -> list[list[int]]:
    """Whole windows of the text, from its beginning. Raises ValueError if there is none."""
    windows = [list(token_ids[i : i + window]) for i in range(0, len(token_ids) - window + 1, window)]
    if not windows:
        raise ValueError(f"the text has {len(token_ids)} tokens, fewer than --window {window}")
    return windows[:most]


def measure(llm: LLM, token_ids: list[int], plain: list[Tensor], number: int) -> Sums:
    """One window. plain: log-probabilities of the plain model by window; the first form that comes leaves its own."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, capture={"layers": ["norm"]})
    (output,) = llm.generate([token_ids], params, use_tqdm=False)
    states = output.outputs[0].hidden_states
    assert states is not None
    (parts,) = llm.apply_model(partial(_log_probs, states["norm"][: len(token_ids) - 1]))
    log_probs = torch.cat(parts)
    if number == len(plain):
        plain.append(log_probs)
    wanted = torch.tensor(token_ids[1:])[:, None]
    return Sums(
        len(wanted),
        -log_probs.gather(1, wanted).double().sum().item(),
        (plain[number].exp() * (plain[number] - log_probs)).double().sum().item(),
        int((plain[number].argmax(1) == log_probs.argmax(1)).sum()),
    )


def _log_probs(states: Tensor, model: Any) -> list[Tensor]:
    weight = next(model.parameters())
    dtype = model.norm.weight.dtype
    with torch.inference_mode():
        rows = states.to(weight.device, dtype).split(_ROWS_AT_ONCE)
        return [model.compute_logits(some).float().log_softmax(1).cpu() for some in rows]


def _row(form: str, weight_bytes: int, sums: Sums) -> dict[str, Any]:
    return {
        "engine": "nanovllm",
        "version": __version__,
        "layout": form,
        "form": form,
        **_options(form),
        "weights_megabytes": weight_bytes / 1e6,
        "tokens": sums.tokens,
        "perplexity": math.exp(sums.surprise / sums.tokens),
        "mean_kl": sums.divergence / sums.tokens,
        "agreement": sums.agreed / sums.tokens,
    }
