"""`nanovllm check-model`: our logits beside Hugging Face's, and the first layer where the two part.

Owns the comparison of numbers; that of text is in `check_tokenizer.py`. Both models run in float32 on the CPU; Hugging
Face's is loaded by transformers itself, so that a mistake of our loader shows too. Invariant: ours runs through the
whole engine, in chunks and through the KV cache, and every position of every prompt is compared.

        ours    embedding -> layer 0 -> layer 1 -> ... -> norm -> logits          (embedding: what enters layer 0)
                    =           =          =               =        =       largest difference, stage by stage
        theirs  embedding -> layer 0 -> layer 1 -> ... -> norm -> logits
"""

import random
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from nanovllm.cli.check_tokenizer import Verdict, compare_tokenizers
from nanovllm.cli.gguf_reference import load_as_read_here
from nanovllm.llm import LLM
from nanovllm.model_files.locate import locate_model
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.sampling_params import SamplingParams

_RANDOM_PROMPT_LENGTHS = (1, 9, 150)
_LAST_NORMS = ("norm", "embedding_norm", "norm_f")  # what transformers' decoders call it
_LONGEST_WINDOW = 1024  # that the random prompts go beyond
_LOGITS_AT_ONCE = 2**24  # numbers of each side, 64 MiB
_CHUNK_TOKENS = 64  # below the longest prompt, so that attention reads earlier chunks from the KV cache

Stages = dict[str, Tensor]  # "embedding", "layer 0", ..., "norm" -> [num_tokens, size]


class Difference(NamedTuple):
    """Of one stage: the largest absolute difference, and the largest absolute value of Hugging Face's side."""

    stage: str
    largest: float
    scale: float


def run(args: Namespace) -> int:
    if args.tolerance <= 0:
        raise ValueError(f"--tolerance must be more than 0, got {args.tolerance}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with LLM(
        args.model,
        revision=args.revision,
        dtype="float32",
        device="cpu",
        max_num_seqs=1,
        max_num_batched_tokens=_CHUNK_TOKENS,
        skip_tokenizer_init=not args.prompt,
    ) as llm:
        verdicts = _check_text(llm, args)
        _say("loading the model with transformers ...")
        theirs = load_hugging_face(args.model, args.revision)
        prompts = args.prompt or _random_prompts(llm)
        num_different = 0
        for number, prompt in enumerate(prompts):
            _say(f"prompt {number + 1} of {len(prompts)} ...")
            ours, token_ids = _run_ours(llm, prompt)
            their_stages = _run_theirs(theirs, token_ids, _model_of(llm))
            differences = compare(ours, their_stages)
            differences.append(_compare_logits(_model_of(llm), ours["norm"], theirs, their_stages["norm"]))
            num_different += not _report(number, len(token_ids), differences, args.tolerance)
    print(f"{len(prompts) - num_different} of {len(prompts)} prompts agree within {args.tolerance:g}")
    verdicts = [Verdict("logits", len(prompts) - num_different, len(prompts)), *verdicts]
    agrees = all(verdict.agrees for verdict in verdicts)
    counts = " ".join(f"{verdict.what.replace(' ', '_')}={verdict.equal}/{verdict.compared}" for verdict in verdicts)
    print(f"check-model: {'PASS' if agrees else 'FAIL'} {counts}")
    return 0 if agrees else 1


def _check_text(llm: LLM, args: Namespace) -> list[Verdict]:
    """Tokens, chat template and stop tokens, where there is a tokenizer to compare with; printed as they come."""
    source = locate_model(
        args.tokenizer or args.model, args.revision if args.tokenizer is None else None, with_weights=False
    )
    try:
        tokenizer = load_tokenizer(args.model, revision=args.revision)
        if source.is_file() or not any(source.glob("*token*")):
            raise ValueError(f"{source} holds none that transformers reads: give the model's own with --tokenizer")
        verdicts = compare_tokenizers(tokenizer, sorted(llm._input_processor.eos_token_ids), source)
    except (ValueError, NotImplementedError) as error:
        print(f"tokenizer: not compared ({error})", flush=True)
        return []
    for verdict in verdicts:
        word = "not compared" if not verdict.compared else "agree" if verdict.agrees else "DIFFER"
        note = f": {verdict.note}" if verdict.note else ""
        print(f"{verdict.what}: {word} ({verdict.equal} of {verdict.compared}){note}", flush=True)
    return verdicts


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def compare(ours: Stages, theirs: Stages) -> list[Difference]:
    """Stage by stage, in the order of the forward pass. Raises ValueError if the two do not have the same stages."""
    if list(ours) != list(theirs):
        raise ValueError(f"ours has {len(ours)} stages and Hugging Face's model {len(theirs)}: not the same decoder")
    return [
        Difference(stage, (ours[stage] - theirs[stage]).abs().max().item(), theirs[stage].abs().max().item())
        for stage in ours
    ]


def first_different(differences: list[Difference], tolerance: float) -> Difference:
    """The first stage that is off by more than `tolerance`, relative to its own values where those exceed 1."""
    return next((d for d in differences if not d.largest <= tolerance * max(1.0, d.scale)), differences[-1])


def _report(number: int, num_tokens: int, differences: list[Difference], tolerance: float) -> bool:
    """Print what was found for one prompt; True if the logits agree. NaN never agrees."""
    logits = differences[-1]
    agrees = logits.largest <= tolerance
    verdict = "agree" if agrees else "DIFFER"
    print(
        f"prompt {number} ({num_tokens} tokens): logits {verdict}, largest difference {logits.largest:.2g}", flush=True
    )
    if not agrees:
        first = first_different(differences, tolerance)
        print(f"  first stage that differs: {first.stage}, by {first.largest:.3g} in values up to {first.scale:.3g}")
    return agrees


def _random_prompts(llm: LLM) -> list[list[int]]:
    """Some short ones, and one that leaves the smallest sliding window if that is not too long for a CPU."""
    rng = random.Random(0)
    longest = llm.config.max_model_len - 1
    windows = [window for window in llm.model_config.windows if window and window <= _LONGEST_WINDOW]
    lengths = [*_RANDOM_PROMPT_LENGTHS, *(window + _RANDOM_PROMPT_LENGTHS[-1] for window in set(windows))]
    return [[rng.randrange(llm.model_config.vocab_size) for _ in range(min(length, longest))] for length in lengths]


def load_hugging_face(name: str, revision: str | None, dtype: str = "float32") -> Any:
    path = locate_model(name, revision, with_weights=True)
    gguf_files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if gguf_files and not any(path.glob("*.safetensors")):
        try:
            return _load(gguf_files[0].parent, transformers.AutoModelForCausalLM, dtype, gguf_file=gguf_files[0].name)
        except Exception as error:  # of many kinds, for what it does not know
            _say(f"transformers cannot read this file ({type(error).__name__}: {error}): it is read here for it")
            return load_as_read_here(gguf_files[0], getattr(torch, dtype)).eval()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    is_multimodal = hasattr(config, "text_config")
    auto_class = transformers.AutoModelForImageTextToText if is_multimodal else transformers.AutoModelForCausalLM
    return _load(path, auto_class, dtype)


def _load(path: Path, auto_class: Any, dtype: str, **source: str) -> Any:
    model = auto_class.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",  # the one that has every family's soft-caps
        local_files_only=True,
        trust_remote_code=False,
        **source,
    )
    return model.eval()


def _run_ours(llm: LLM, prompt: Any) -> tuple[Stages, list[int]]:
    """Stages of every prompt token, and the prompt's token ids."""
    model = _model_of(llm)
    with _record(model.layers, model, model.layers[0]) as recorded:
        (output,) = llm.generate(
            [prompt], SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), use_tqdm=False
        )
    num_tokens = len(output.prompt_token_ids)
    stages = {stage: torch.cat(parts)[:num_tokens] for stage, parts in recorded.items()}
    return stages, output.prompt_token_ids


@torch.inference_mode()
def _run_theirs(model: Any, token_ids: list[int], ours: Any) -> Stages:
    decoder = getattr(model.model, "language_model", model.model)  # of a multimodal model, the text model alone
    last = next(getattr(decoder, name) for name in _LAST_NORMS if hasattr(decoder, name))
    ends = getattr(ours, "ends_of_layers", range(len(decoder.layers)))
    with _record([decoder.layers[end] for end in ends], last, decoder.layers[0]) as recorded:
        decoder(torch.tensor([token_ids]), use_cache=False)
    return {stage: parts[0][0] for stage, parts in recorded.items()}


class _Given(nn.Module):
    """A decoder that has computed already: what the model does behind it can be done for some rows at a time."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **options: Any) -> Any:
        # That of mixtures has all that others have, but for what Gemma 4's layers share.
        output = transformers.modeling_outputs.MoeModelOutputWithPast(last_hidden_state=self.hidden[None])
        output.shared_kv_states = None
        return output


@torch.inference_mode()
def _compare_logits(ours: Any, our_hidden: Tensor, theirs: Any, their_hidden: Tensor) -> Difference:
    """A few rows at a time: all of them, for 262,144 tokens in float32, would take more memory than the model."""
    decoder, num_rows = theirs.model, max(1, _LOGITS_AT_ONCE // theirs.config.get_text_config().vocab_size)
    is_multimodal = hasattr(decoder, "language_model")  # behind its text model come its head and a soft-cap, no more
    softcap = getattr(theirs.config.get_text_config(), "final_logit_softcapping", None)
    parts: list[Difference] = []
    try:
        for our_rows, their_rows in zip(our_hidden.split(num_rows), their_hidden.split(num_rows), strict=True):
            if is_multimodal:
                logits = theirs.lm_head(their_rows)
                logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
            else:
                theirs.model = _Given(their_rows)
                logits = theirs(torch.zeros(1, len(their_rows), dtype=torch.long), use_cache=False).logits[0]
            parts += compare({"logits": ours.compute_logits(our_rows)}, {"logits": logits})
    finally:
        theirs.model = decoder
    # torch's maximum, since NaN has to stay one.
    largest, scale = (torch.tensor(values).max().item() for values in zip(*(part[1:] for part in parts), strict=True))
    return Difference("logits", largest, scale)


def _model_of(llm: LLM) -> Any:
    return llm.apply_model(lambda model: model)[0]


@contextmanager
def _record(layers: Iterable[nn.Module], last: nn.Module, first: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what enters `first`, and what the others return: one tensor a call, (x, residual) added up."""
    modules = {**{f"layer {i}": layer for i, layer in enumerate(layers)}, "norm": last}
    recorded: dict[str, list[Tensor]] = {stage: [] for stage in ("embedding", *modules)}

    def record_input(module: nn.Module, inputs: Any, options: Any) -> None:
        recorded["embedding"].append((inputs[0] if inputs else options["hidden_states"]).detach().clone())

    def recorder(stage: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = [part for part in output if part is not None] if isinstance(output, tuple) else [output]
            recorded[stage].append(torch.stack(parts).sum(0).detach())

        return record

    handles = [first.register_forward_pre_hook(record_input, with_kwargs=True)]
    handles += [module.register_forward_hook(recorder(stage)) for stage, module in modules.items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
