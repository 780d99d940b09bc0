"""Which files of the package one CPU `generate` enters, one a line. Run by `test_reading.py`: python -m ... FOLDER

A first call is not traced: what it imports or builds late is then there.
"""

import sys
import threading
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams

PACKAGE = Path(__file__).parent.parent / "nanovllm"


def main(model: str) -> None:
    entered: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    def generate(llm: LLM) -> None:
        params = [SamplingParams(temperature=0, max_tokens=12), SamplingParams(seed=1, top_p=0.9, max_tokens=12)]
        llm.generate(["once upon a time", "there was"], params, use_tqdm=False)

    with LLM(model, device="cpu", dtype="float32") as llm:
        generate(llm)
        threading.setprofile(note)
        sys.setprofile(note)
        generate(llm)
        sys.setprofile(None)
    for name in sorted(entered):
        if Path(name).is_relative_to(PACKAGE):
            print(Path(name).relative_to(PACKAGE).as_posix())


if __name__ == "__main__":
    main(sys.argv[1])
