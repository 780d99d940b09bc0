"""LiveWeights: what `LLM` offers a training loop: new weights, a pause, sleep, and which weights are at work.

Owns the order of these calls, and why nothing can be generated where that is so. Invariant: nothing is generated with
weights of which a part is missing.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import NamedModule, ResolvedConfig
from nanovllm.engine.features.weights_version import WeightsVersion
from nanovllm.engine.session import Session
from nanovllm.errors import NotReadyError
from nanovllm.live.doors import OnWorker, call_method
from nanovllm.live.in_flight import check_mode, is_paused, pause, resume
from nanovllm.live.model_weights import Table, weights_of
from nanovllm.live.sleep import FallAsleep, TakeBack, read_level, read_tags
from nanovllm.live.update import Update, everywhere, on_workers, table_of
from nanovllm.model_config import ModelConfig
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm.weights.module import copies

Weights = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


@dataclass
class LiveState:
    """missing: tensors without a value. asleep: tags of memory that is given back. is_paused: by `pause`. open: the
    update that `start_weight_update` began.
    """

    version: WeightsVersion = field(default_factory=WeightsVersion)
    missing: set[str] = field(default_factory=set)
    asleep: set[str] = field(default_factory=set)
    is_paused: bool = False
    table: Table | None = None
    open: Update | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


class LiveWeights:
    # What `LLM` has.
    config: ResolvedConfig
    model_config: ModelConfig
    _session: Session

    @property
    def _live(self) -> LiveState:
        own = vars(self)
        state: LiveState = own["_live_state"] if "_live_state" in own else own.setdefault("_live_state", LiveState())
        return state

    @property
    def weights_version(self) -> int:
        """How many updates there have been; each token of an output names its own (`weights_versions`)."""
        return self._live.version.number

    def update_weights(self, weights: Weights | None = None, *, mode: str = "keep") -> int:
        """Take these tensors in the place of the old ones, all or none, and return the number of the new version.

        weights: pairs of a Hugging Face name and a whole tensor, on the CPU or a GPU, one or all of the model's. They
        are read behind the last one, so each has memory of its own until the call returns. Left out for an engine of a
        model in this process, whose parameters have changed. mode: what becomes of
        requests in flight: they "keep" on where they are, "recompute" their keys and values, "restart" behind their
        prompts, "abort", or the call must "wait" for their ends; nobody finds what the old weights left in the prefix
        cache. Generation goes on until the last tensor has come. Whatever raises, here or in `weights`, leaves the old
        weights: TypeError, ValueError or NotImplementedError names a tensor that does not fit.
        """
        check_mode(mode)
        live = self._live
        with live.lock:
            self._check_awake()
            if weights is None:
                weights = self._changed()
            if live.open is not None:
                self._take(live.open, weights)
                return live.version.number
            update = Update(self._session, self._table())
            self._take(update, weights)
            return self._commit(update, mode)

    def _changed(self) -> Weights:
        """What an engine of a model in this process has not got already, as it shares the memory of the rest."""
        model = self.config.model
        if not isinstance(model, NamedModule):
            raise TypeError("update_weights() needs weights, as this engine was not built of a model in this process")
        planner = self._session.engine.planner
        assert planner is not None
        return copies(model.module, planner.executor.apply(weights_of)[0].specs())

    def start_weight_update(self) -> None:
        """Let `update_weights` collect tensors, call by call, until `finish_weight_update` writes them all at once."""
        live = self._live
        with live.lock:
            if live.open is not None:
                raise RuntimeError("an update has been started: call finish_weight_update() before the next one")
            live.open = Update(self._session, self._table())

    def finish_weight_update(self, *, mode: str = "keep") -> int:
        """Write what came since `start_weight_update`; returns the number of the new version."""
        check_mode(mode)
        live = self._live
        with live.lock:
            update, live.open = live.open, None
            if update is None:
                raise RuntimeError("no update is open: one has failed, or start_weight_update() was not called")
            return self._commit(update, mode)

    def _take(self, update: Update, weights: Weights) -> None:
        try:
            update.take(weights)
        except BaseException:
            self._live.open = None
            update.drop()
            raise

    def _commit(self, update: Update, mode: str, version: WeightsVersion | None = None) -> int:
        live, names = self._live, set(update.names)
        version = version or live.version.next()
        try:
            update.commit(version, mode)
            live.version = version
            live.missing -= names
        except BaseException:
            if not update.is_half_written:
                update.drop()
            raise
        finally:
            if update.is_half_written:
                live.missing |= names
            self._follow()
        return version.number

    def _follow(self) -> None:
        """Hold the engine while something is missing, and let it go when nothing is any more."""
        live, session = self._live, self._session
        is_held = bool(live.missing or live.asleep)
        session.get_ready = self._get_ready if is_held else None
        if not session.is_closed and not is_held and not live.is_paused and is_paused(session):
            session.exclusively(lambda: resume(session))

    def _get_ready(self) -> None:
        """Before something is asked for: raise RuntimeError unless the weights are there; a KV cache is woken."""
        live = self._live
        with live.lock:
            self._check_awake()
            if live.missing and not live.version.number:
                self._read_again()
            if live.missing:
                raise NotReadyError(
                    f"{len(live.missing)} tensors of the model have no value, {min(live.missing)!r} among them: "
                    "update_weights() with them first"
                )
            if live.asleep:
                self.wake_up()

    def _check_awake(self) -> None:
        if "weights" in self._live.asleep:
            raise NotReadyError("the engine sleeps, and its weights with it: wake_up() first")

    def _read_again(self) -> None:
        """From the checkpoint, where its weights were the last ones."""
        config, dtype = self.config, getattr(torch, self.model_config.dtype)
        if config.load_format == "dummy":
            return
        is_packed = config.quantization == "gguf"
        options = {"load_format": config.load_format, "revision": config.revision, "is_packed": is_packed}
        checkpoint = open_checkpoint(config.model, **options)  # type: ignore[arg-type]
        update = Update(self._session, self._table())
        self._take(update, checkpoint.tensors(dtype))
        self._commit(update, "keep", self._live.version)

    def _table(self) -> Table:
        live = self._live
        if live.table is None:
            live.table = table_of(self._session)
        return live.table

    # -- a pause --

    def pause(self, mode: str = "abort") -> None:
        """Generate nothing until `resume`; what is asked for meanwhile waits. mode: of the requests in flight: they
        "abort" with the output that they have, "wait" for their ends is done first, or they go on at `resume`: "keep"
        where they are, "recompute" with their keys and values anew, "restart" behind their prompts.
        """
        check_mode(mode)
        with self._live.lock:
            self._live.is_paused = True
            try:
                self._session.exclusively(lambda: pause(self._session, mode))
            except BaseException:
                self._live.is_paused = is_paused(self._session)
                raise

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._live.lock:
            self._live.is_paused = False
            self._follow()

    @property
    def is_paused(self) -> bool:
        """Whether `pause` holds generation."""
        return self._live.is_paused

    # -- workers --

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """What method(worker, *args, **kwargs) returns for each worker: one that has `model_runner.model` and `device`.

        A name stands for the method of `LLM` that does the same. timeout: as `distributed_timeout_seconds` says.
        """
        if isinstance(method, str):
            return call_method(self, method, args, kwargs or {})
        return on_workers(self._session, OnWorker(method, args, kwargs or {}))

    def get_weight_version(self) -> int:
        """`weights_version`, by vLLM's name."""
        return self.weights_version

    # -- sleep --

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give the memory of weights and KV cache back to the device, until `wake_up`.

        level: 1 keeps what the weights are in the host's memory; 2 forgets it, and after `wake_up` all of them are to
        be given by `update_weights`, or, if there has been no update, are read from the checkpoint again. The weights
        of a model in this process stay where they are. Nothing can be asked for meanwhile. mode: of requests in flight,
        as for `pause`; those that go on are computed anew.
        """
        check_mode(mode)
        keeps_weights = read_level(level) == 1 or isinstance(self.config.model, NamedModule)
        if self.config.device != "cpu" and not self.config.enable_sleep_mode:
            raise ValueError("an engine on a GPU sleeps only if it was built with enable_sleep_mode=True")
        live, session = self._live, self._session
        with live.lock:
            if live.open is not None:
                raise RuntimeError("an update has been started: finish_weight_update() before sleep()")
            filled = set() if keeps_weights else self._names()
            if "weights" in live.asleep:
                if not keeps_weights and not live.missing >= filled:
                    raise RuntimeError("the engine sleeps already, at level 1: wake_up() before sleep(level=2)")
                if "kv_cache" in live.asleep:
                    return

            def fall_asleep() -> None:
                pause(session, mode)
                live.asleep, live.missing = {"weights", "kv_cache"}, live.missing | filled
                everywhere(session, FallAsleep(keeps_weights))

            session.get_ready = self._get_ready
            try:
                session.exclusively(fall_asleep)
            except BaseException:
                self._follow()
                raise

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory back: for "weights", "kv_cache", or, by default, both.

        Raises torch.OutOfMemoryError where the device has too little; it may be called again.
        """
        live, woken = self._live, read_tags(tags)
        with live.lock:
            on_workers(self._session, TakeBack(woken))
            live.asleep -= set(woken)
            self._follow()

    def _names(self) -> set[str]:
        """Of all tensors that make up the model. Raises NotImplementedError if one of them cannot be given again."""
        slots = self._table().slots
        for name, slot in slots.items():
            if slot.frozen:
                raise NotImplementedError(f"{name!r} could not be given again: {slot.frozen}; use sleep(level=1)")
        return {name for name, slot in slots.items() if not slot.instead_of}

    @property
    def is_sleeping(self) -> bool:
        return bool(self._live.asleep)
