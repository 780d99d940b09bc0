"""GRPO with TRL on the demo model, on a CPU: the engine generates on the trainer's own parameters.

    pip install nanovllm trl
    python examples/grpo.py [--steps 30] [--model MODEL] [--out tokens.json]

The reward is a toy: the share of lower-case vowels among a completion's characters. It rises within a few dozen steps.
With `deterministic=True` and the same seed, two runs draw the same tokens to the bit; `--out` writes them down.
"""

import argparse
import json
import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from nanovllm.model_files.locate import locate_model
from nanovllm.rl import Rollout

PROMPTS = ["Once upon a time", "The capital of France is", "My favourite colour is", "In the beginning there was"]


def reward(completions: list[str], **_: object) -> list[float]:
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in completions]


def load_demo() -> tuple[Any, Any]:
    """Tokenizer and model. transformers makes a GGUF file dense, but counts it as quantized and refuses it."""
    file = locate_model("demo", None, with_weights=True)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return AutoTokenizer.from_pretrained(**source), model


def load(name: str) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", help="a folder or Hub name that transformers loads (default: the demo model)")
    parser.add_argument("--out", help="write rewards and all tokens to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)

    tokenizer, model = load(args.model) if args.model else load_demo()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rollout = Rollout(deterministic=True, dtype="float32", max_model_len=64, max_num_seqs=8)
    drawn: list[list[int]] = []

    def remember(prompts: list[str], trainer: GRPOTrainer) -> dict[str, object]:
        result = rollout(prompts, trainer)
        drawn.extend(result["completion_ids"])
        return result

    with tempfile.TemporaryDirectory() as logs:
        config = GRPOConfig(
            output_dir=logs,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=8,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            beta=0.0,
            gradient_checkpointing=False,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 64}),
            rollout_func=remember,
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print("mean reward, step by step:", " ".join(f"{value:.3f}" for value in rewards))
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"rewards": rewards, "tokens": drawn, "version": rollout.llm.weights_version}, file)


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    main()
