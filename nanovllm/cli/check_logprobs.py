"""`nanovllm check-logprobs`: the engine's log-probabilities beside those of a trainer's forward pass, token by token.

Owns the report; the comparison is `rl/consistency.py`'s. A training loop that weighs tokens by the ratio of the two
sees exactly this difference.
"""

from argparse import Namespace

import transformers

from nanovllm.cli.check_model import load_hugging_face
from nanovllm.cli.options import engine_options, sampling_options
from nanovllm.llm import LLM
from nanovllm.rl.consistency import compare_logprobs, mean_and_worst
from nanovllm.sampling_params import SamplingParams

_PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea,", "1 2 3 4 5 6 7"]


def run(args: Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    params = SamplingParams(**{"max_tokens": 32, "seed": 0, **sampling_options(args)})
    with LLM(args.model, **engine_options(args)) as llm:
        model = load_hugging_face(args.model, llm.config.revision, llm.config.dtype).to(llm.config.device)
        found = compare_logprobs(llm, model, args.prompt or _PROMPTS, params)
    if args.positions:
        print("prompt token      id     engine  trainer less engine  rescored less engine")
        for i, ids in enumerate(found.token_ids):
            rows = zip(ids, found.logprobs[i], found.trainer[i], found.rescored[i], strict=True)
            for at, (token_id, own, trainer, rescored) in enumerate(rows):
                print(f"{i:>6} {at:>5} {token_id:>7} {own:>10.5f} {trainer:>20.3g} {rescored:>21.3g}")
    for who, differences in (("trainer's forward pass", found.trainer), ("engine, rescored", found.rescored)):
        mean, worst = mean_and_worst(differences)
        print(f"{who}: mean {mean:.3g}, worst {worst:.3g} over {sum(map(len, differences))} tokens")
    _, worst = mean_and_worst(found.trainer)
    return 0 if worst <= args.tolerance else 1
