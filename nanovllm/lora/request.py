"""LoRARequest: which adapter a request is computed with, as its caller names it: a PEFT folder, or tensors.

Owns the name and the source; `adapter_files.py` reads it. Imports no torch. Invariant: plain data; nothing is read or
checked against a model before an engine is given it.
"""

import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any


class LoRARequest:
    """LoRARequest(name, path), LoRARequest(name, tensors, peft_config), or vLLM's LoRARequest(name, id, path).

    lora_name: what the engine knows the adapter by; the same name with another source replaces it. lora_int_id: a
    number from 1 on, for `remove_lora` and `list_loras`; None makes one of the name. lora_path: a folder with
    adapter_config.json and adapter_model.safetensors. tensors: the same tensors by the names that PEFT saves them under
    (`get_peft_model_state_dict`), with peft_config, a mapping of what adapter_config.json says or a `LoraConfig`.
    load_inplace: read the source anew, also if the engine has read it before; tensors are read anew by every
    `add_lora`. Raises TypeError or ValueError.
    """

    def __init__(
        self,
        lora_name: str,
        lora_int_id: int | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        lora_path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        tensors: Mapping[str, Any] | None = None,
        peft_config: Any = None,
        load_inplace: bool = False,
    ) -> None:
        if isinstance(lora_int_id, (str, os.PathLike)):
            lora_int_id, lora_path = None, lora_int_id
        elif isinstance(lora_int_id, Mapping):  # the third is then what the tensors mean
            if lora_path is not None and peft_config is None:
                peft_config, lora_path = lora_path, None
            lora_int_id, tensors = None, lora_int_id
        if not isinstance(lora_name, str) or not lora_name:
            raise ValueError(f"lora_name must be a text that is not empty, got {lora_name!r}")
        if lora_int_id is not None and (not isinstance(lora_int_id, int) or isinstance(lora_int_id, bool)):
            raise TypeError(f"lora_int_id must be an integer, got {lora_int_id!r}")
        if lora_int_id is not None and lora_int_id < 1:
            raise ValueError(f"lora_int_id must be at least 1, got {lora_int_id}")
        if (lora_path is None) == (tensors is None):
            raise ValueError(f"LoRARequest({lora_name!r}) needs a lora_path or tensors, one of the two")
        if tensors is not None and peft_config is None:
            raise ValueError(
                f"LoRARequest({lora_name!r}): tensors need a peft_config, at least {{'r': ..., 'lora_alpha': ...}}"
            )
        if lora_path is not None and not isinstance(lora_path, (str, os.PathLike)):
            raise TypeError(f"lora_path must be a path, got {lora_path!r}")
        self.lora_name = lora_name
        self.lora_int_id = _id_of(lora_name) if lora_int_id is None else lora_int_id
        self.lora_path = None if lora_path is None else os.fspath(lora_path)
        self.tensors = tensors
        self.peft_config = peft_config
        self.load_inplace = load_inplace

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str | None:
        return self.lora_path

    def has_source_of(self, other: "LoRARequest") -> bool:
        """Do both name the same folder, or the same tensors?"""
        return self.lora_path == other.lora_path and self.tensors is other.tensors

    def __repr__(self) -> str:
        source = "tensors" if self.lora_path is None else repr(self.lora_path)
        return f"LoRARequest({self.lora_name!r}, {self.lora_int_id}, {source})"


def _id_of(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little") % (2**31 - 1) + 1
