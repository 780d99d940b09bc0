"""Adapters by name: which an LLM knows, where each comes from, and what a call that names one is computed with.

Owns names, ids and versions; the numbers are with the workers (`lora/adapter_store.py`), and slots are the scheduler's.
Invariant: a request is computed with one version from its first token to its last, whatever its name comes to mean
meanwhile; a version leaves the workers once neither its name nor a request holds on to it.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from nanovllm.engine.features.adapters import AdapterRef
from nanovllm.engine.features.prompt_forms import not_one_each
from nanovllm.engine.request import Request
from nanovllm.lora.request import LoRARequest

if TYPE_CHECKING:
    from nanovllm.config import ResolvedConfig
    from nanovllm.data_parallel import DataParallelEngine
    from nanovllm.engine.engine import Engine
    from nanovllm.engine.session import Session

Adapters = LoRARequest | Sequence[LoRARequest | None] | None  # for all prompts of a call, or one for each


@dataclass
class _Known:
    """What a name stands for now."""

    request: LoRARequest
    ref: AdapterRef
    is_pinned: bool = False


class AdapterRegistry:
    """tell: calls a function on the model of each worker, between two steps.

    Who changes what is known holds `_changing`, also while it reads or tells. Whoever only looks holds `_lock`, and so
    waits for nobody: an event loop may.
    """

    def __init__(self, tell: Callable[[Callable[[Any], Any]], object], max_adapters: int) -> None:
        self._tell = tell
        self._max_adapters = max_adapters
        self._known: dict[str, _Known] = {}  # by name, the one that was not asked for the longest first
        self._refs: weakref.WeakValueDictionary[bytes, AdapterRef] = weakref.WeakValueDictionary()
        self._forgotten: deque[bytes] = deque()  # keys that nothing holds on to any more
        self._changing = threading.RLock()
        self._lock = threading.Lock()

    def find(self, request: LoRARequest) -> AdapterRef:
        """What the request names, read if need be."""
        if (ref := self._find_known(request)) is not None:
            return ref
        with self._changing:
            ref = self._find_known(request)
            return self.add(request) if ref is None else ref

    def _find_known(self, request: LoRARequest) -> AdapterRef | None:
        with self._lock:
            if self.needs_reading(request):
                return None
            known = self._known[request.lora_name] = self._known.pop(request.lora_name)
            return known.ref

    def needs_reading(self, request: LoRARequest) -> bool:
        known = self._known.get(request.lora_name)
        return known is None or request.load_inplace or not known.request.has_source_of(request)

    def add(self, request: LoRARequest) -> AdapterRef:
        """Read it, and let its name stand for what was read."""
        from nanovllm.lora.adapter_files import read_adapter
        from nanovllm.lora.adapter_store import add_to

        _check(request)
        with self._changing:
            with self._lock:
                self._check_id(request)
                self._who_leaves(request.lora_name)
            weights = read_adapter(request)
            ref = self._refs.get(weights.key)
            if ref is None:
                self._tell(partial(add_to, weights))
                ref = AdapterRef(weights.key)
                weakref.finalize(ref, self._forgotten.append, weights.key).atexit = False
                self._refs[weights.key] = ref
            with self._lock:
                replaced = self._who_leaves(request.lora_name)
                is_pinned = replaced is not None and self._known.pop(replaced).is_pinned
                self._known[request.lora_name] = _Known(request, ref, is_pinned)
            self._drop_forgotten()
            return ref

    def _check_id(self, request: LoRARequest) -> None:
        for name, known in self._known.items():
            if known.request.lora_int_id == request.lora_int_id and name != request.lora_name:
                raise ValueError(
                    f"{request.lora_name!r} has the lora_int_id {request.lora_int_id} of {name!r}; choose another"
                )

    def _who_leaves(self, name: str) -> str | None:
        """Which name gives its place to this one: itself, if it is known, or the one that was asked for the least."""
        if name in self._known or len(self._known) < self._max_adapters:
            return name if name in self._known else None
        oldest = next((name for name, known in self._known.items() if not known.is_pinned), None)
        if oldest is None:
            raise ValueError(
                f"all {self._max_adapters} adapters that the engine keeps (max_cpu_loras) are pinned; remove one"
            )
        return oldest

    def _drop_forgotten(self) -> None:
        from nanovllm.lora.adapter_store import drop_from

        keys = []
        while self._forgotten:
            key = self._forgotten.popleft()
            if key not in self._refs:
                keys.append(key)
        if keys:
            self._tell(partial(drop_from, keys))

    def remove(self, adapter: int | str) -> bool:
        with self._changing:
            with self._lock:
                name = self._name_of(adapter)
                if name is not None:
                    del self._known[name]
            self._drop_forgotten()
            return name is not None

    def pin(self, adapter: int | str) -> bool:
        with self._lock:
            name = self._name_of(adapter)
            if name is None:
                raise ValueError(f"there is no adapter {adapter!r} to pin; it has {sorted(self._known)}")
            self._known[name].is_pinned = True
            return True

    def ids(self) -> set[int]:
        with self._lock:
            return {known.request.lora_int_id for known in self._known.values()}

    def _name_of(self, adapter: int | str) -> str | None:
        names = (name for name, known in self._known.items() if adapter in (name, known.request.lora_int_id))
        return next(names, None)


def _check(request: object) -> None:
    if not isinstance(request, LoRARequest):
        raise TypeError(f"lora_request must be a LoRARequest, got {request!r}")


class AdaptedLLM:
    """The part of `LLM` that knows adapters."""

    # What `LLM` has.
    config: "ResolvedConfig"
    _session: "Session"
    _engine: "Engine | DataParallelEngine"

    @cached_property
    def _adapters(self) -> AdapterRegistry:
        if not self.config.enable_lora:
            raise ValueError("this engine has no room for adapters; make it with enable_lora=True")

        def tell(function: Callable[[Any], Any]) -> object:
            return self._session.exclusively(partial(self._engine.apply_model, function))

        return AdapterRegistry(tell, self.config.max_cpu_loras)

    def _give_adapters(self, groups: Sequence[Sequence[Request]], lora_request: Adapters) -> None:
        """groups: the sequences of each prompt, not queued yet."""
        each: list[Any] = (
            list(lora_request) if isinstance(lora_request, (list, tuple)) else [lora_request] * len(groups)
        )
        if len(each) != len(groups):
            raise not_one_each(each, "lora_request", "a LoRARequest", len(groups))
        for request in each:
            if request is not None:
                _check(request)
        refs = [None if request is None else self._adapters.find(request) for request in each]
        for ref, group in zip(refs, groups, strict=True):
            if ref is not None:
                ref.give_to(group)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter, from now on known by its name; one of that name is replaced. Returns True.

        Requests that run go on with what they began with. Raises FileNotFoundError, TypeError, ValueError or
        NotImplementedError for an adapter that is not there, not supported, or not for this model; then nothing has
        changed.
        """
        self._adapters.add(lora_request)
        return True

    def remove_lora(self, lora_id: int | str) -> bool:
        """Forget an adapter, by its id or its name; whether there was one. Requests that run go on with it."""
        return self._adapters.remove(lora_id)

    def list_loras(self) -> set[int]:
        """The ids of the adapters that are known."""
        return self._adapters.ids()

    def pin_lora(self, lora_id: int | str) -> bool:
        """Let no other adapter take this one's place. ValueError if there is none of that id or name."""
        return self._adapters.pin(lora_id)
