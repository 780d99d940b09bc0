"""The rollout class for verl, with verl's own batches and configs. Skipped where verl is not installed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live.new_weights import save_two, tensors_of
from tests.tiny_models import random_prompts

pytestmark = pytest.mark.integrations
PROMPTS = random_prompts([3, 9, 1])


def test_verl_finds_it_and_gives_it_weights_and_prompts(tmp_path: Path) -> None:
    verl = pytest.importorskip("verl")
    from verl.workers.config import HFModelConfig, RolloutConfig
    from verl.workers.rollout.base import get_rollout_class

    from nanovllm.rl.verl import NAME, NanoRollout, register

    register()
    assert get_rollout_class(NAME) is NanoRollout
    folders = save_two(tmp_path)
    engine: dict[str, Any] = {NAME: {"device": "cpu", "block_size": 8}}
    config = RolloutConfig(
        name=NAME, dtype="float32", prompt_length=16, response_length=6, n=2, tensor_model_parallel_size=1,
        max_num_seqs=8, max_num_batched_tokens=64, ignore_eos=True, engine_kwargs=engine,
    )  # fmt: skip
    model = HFModelConfig(path=str(folders[0]), load_tokenizer=False)
    rollout = NanoRollout(config, model)
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = torch.tensor(prompt), 1
    about = {"eos_token_id": 1, "pad_token_id": 0, "do_sample": False}
    batch = verl.DataProto.from_single_dict(
        {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1)}, meta_info=about
    )

    def responses() -> torch.Tensor:
        found = rollout.generate_sequences(batch).batch
        assert found["responses"].shape == (3, 6) and (found["rollout_log_probs"] <= 0).all()
        assert torch.equal(found["input_ids"], torch.cat((ids, found["responses"]), 1))
        assert torch.equal(found["attention_mask"].sum(1), mask.sum(1) + 6)
        result: torch.Tensor = found["responses"]
        return result

    before = responses()
    asyncio.run(rollout.release())
    with pytest.raises(RuntimeError, match="sleeps"):
        responses()
    asyncio.run(rollout.resume(["weights"]))
    asyncio.run(rollout.update_weights(iter(tensors_of(folders[1]).items())))
    asyncio.run(rollout.resume(["kv_cache"]))
    assert not torch.equal(responses(), before)
    batch.meta_info["do_sample"] = True
    assert rollout.generate_sequences(batch).batch["responses"].shape == (6, 6)
    with pytest.raises(NotImplementedError, match="delta_flush"):
        asyncio.run(rollout.update_weights(iter(()), wire_format="delta_flush"))
    rollout.llm.close()
