"""A batch job that is killed again and again gives, to the byte, what an uninterrupted one gives."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

OPTIONS = ["--device", "cpu", "--num-gpu-blocks-override", "256", "--max-num-seqs", "16", "--deterministic", "--quiet"]
LONGEST_SECONDS = 600  # a guard against hanging


def command(source: Path, out: Path, model: Path) -> list[str]:
    start = [sys.executable, "-m", "nanovllm.cli.main", "batch", str(source), str(out), "--model", str(model)]
    return [*start, "--max-tokens", "12", "--temperature", "0.8", *OPTIONS]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    num_kills, num_rows = (int(request.config.getoption(name)) for name in ("--kills", "--rows"))
    model = save_random(tmp_path / "model", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(model)
    chance = random.Random(0)
    source, out, expected = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "expected.jsonl"))
    prompts = ["".join(chance.choices("abc ", k=chance.randint(1, 60))) for _ in range(num_rows)]
    own = [{"max_tokens": chance.randint(1, 30)} if chance.random() < 0.3 else None for _ in prompts]
    rows = [{"prompt": prompt, "sampling_params": params} for prompt, params in zip(prompts, own, strict=True)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(command(source, expected, model), check=True, timeout=LONGEST_SECONDS)

    journal = tmp_path / "out.jsonl.journal"
    kept: list[bytes] = []
    for number in range(num_kills):
        process = subprocess.Popen(command(source, out, model))
        # Spread over the job: the next kill comes when its share of the rows is done, give or take, and a little later.
        target = 1 + num_rows * (number + chance.random()) / num_kills
        deadline = time.monotonic() + LONGEST_SECONDS
        while num_lines(journal) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.wait()
        if out.exists():
            break  # it was faster than the signal
        whole = journal.read_bytes().rpartition(b"\n")[0]
        assert whole.startswith(b"\n".join(kept)), "what was done stays as it is"
        kept = whole.split(b"\n")
        done = [json.loads(line)["row"] for line in kept[1:]]
        assert len(done) == len(set(done)), "no row is computed twice"
    subprocess.run(command(source, out, model), check=True, timeout=LONGEST_SECONDS)
    assert out.read_bytes() == expected.read_bytes()
