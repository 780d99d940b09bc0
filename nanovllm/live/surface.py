"""LiveWeights: what `LLM` offers a training loop: new weights, a pause, and which version of the weights is at work.

Owns the order of these calls, and why nothing can be generated where that is so. Invariant: nothing is generated with
weights of which a part is missing.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nanovllm.engine.features.weights_version import WeightsVersion
from nanovllm.engine.session import Session
from nanovllm.live.in_flight import check_mode, is_paused, pause, resume
from nanovllm.live.model_weights import Table
from nanovllm.live.update import Update, table_of

Weights = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


@dataclass
class LiveState:
    """missing: tensors without a value. is_paused: by `pause`. open: the update that `start_weight_update` began."""

    version: WeightsVersion = field(default_factory=WeightsVersion)
    missing: set[str] = field(default_factory=set)
    is_paused: bool = False
    table: Table | None = None
    open: Update | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


class LiveWeights:
    # What `LLM` has.
    _session: Session

    @property
    def _live(self) -> LiveState:
        state: LiveState = vars(self).setdefault("_live_state", LiveState())
        return state

    @property
    def weights_version(self) -> int:
        """How many updates there have been; each token of an output names its own (`weights_versions`)."""
        return self._live.version.number

    def update_weights(self, weights: Weights, *, mode: str = "keep") -> int:
        """Take these tensors in the place of the old ones, all or none, and return the number of the new version.

        weights: pairs of a Hugging Face name and a whole tensor, on the CPU or a GPU, one or all of the model's. They
        are read behind the last one, so each has memory of its own until the call returns. mode: what becomes of
        requests in flight: they "keep" on where they are, "recompute" their keys and values, "restart" behind their
        prompts, "abort", or the call must "wait" for their ends; nobody finds what the old weights left in the prefix
        cache. Generation goes on until the last tensor has come. Whatever raises, here or in `weights`, leaves the old
        weights: TypeError, ValueError or NotImplementedError names a tensor that does not fit.
        """
        check_mode(mode)
        live = self._live
        with live.lock:
            if live.open is not None:
                self._take(live.open, weights)
                return live.version.number
            update = Update(self._session, self._table())
            self._take(update, weights)
            return self._commit(update, mode)

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

    def _commit(self, update: Update, mode: str) -> int:
        live, names = self._live, set(update.names)
        version = live.version.next()
        try:
            update.commit(version, mode)
            live.version = version
            live.missing -= names
        finally:
            if update.is_half_written:
                live.missing |= names
            self._follow()
        return version.number

    def _follow(self) -> None:
        """Hold the engine while something is missing, and let it go when nothing is any more."""
        live, session = self._live, self._session
        session.refusal = self._refusal()
        held = session.refusal is not None
        if not session.is_closed and not held and not live.is_paused and is_paused(session):
            session.exclusively(lambda: resume(session))

    def _refusal(self) -> str | None:
        missing = self._live.missing
        if not missing:
            return None
        return (
            f"{len(missing)} tensors of the model have no value, {min(missing)!r} among them: update_weights() with "
            "them first"
        )

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
