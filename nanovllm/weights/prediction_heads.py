"""Multi-token prediction (MTP; DeepSeek-V3, 2024): heads of a checkpoint for further tokens, which a model is
loaded without.

Owns which tensors are of such heads. Invariant: what is left out is said; the next token's logits do not depend on it.
`models/mtp.py` drafts with them.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_of_prediction_head(name: str, config: Mapping[str, Any]) -> bool:
    """By its name ("mtp" in front), or as a layer behind the last one where the config says that there are such."""
    parts = name.removeprefix("model.").split(".")
    if parts[0].startswith("mtp"):
        return True
    num_layers, num_more = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if not isinstance(num_layers, int) or not isinstance(num_more, int) or parts[0] != "layers" or len(parts) < 3:
        return False
    return parts[1].isdecimal() and int(parts[1]) in range(num_layers, num_layers + num_more)


def warn_of_prediction_heads(count: int, path: Path) -> None:
    """count: of the tensors that are left out; nothing is said of none."""
    if count:
        warnings.warn(
            f"{path}: {count} tensors of multi-token prediction (MTP) are left out; only the method 'mtp' of "
            "speculative_config reads them",
            stacklevel=2,
        )
