"""LoRARequest, where vLLM has it, for programs that import it whether they use it or not.

Invariant: there is never an instance of it.
"""

from typing import Any, NoReturn


class LoRARequest:
    def __new__(cls, *args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError("LoRA is not supported; merge the adapter into the weights and load those")
