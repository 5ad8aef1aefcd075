"""Engines on devices: opened when a policy asks for them, measured where it leaves the choice, moved while they run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Collection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from inferos.config import Policy
from inferos.devices.balancer import LoadBalancer, temperature
from inferos.devices.manager import Choice, DeviceManager
from inferos.devices.placement import Placement, Speed, asked_for, plan_placement
from inferos.devices.probe import CPU, Device
from inferos.errors import ModelError, ProviderError
from inferos.runtime.protocols import DecoderSession, Engine, Role
from inferos.runtime.routes import Routes

__all__ = ["DeferredEngine", "Placed", "Placer", "measure_speed"]

_PROMPT, _STEPS, _ROUNDS = 32, 4, 4
_ENOUGH_SECONDS = 0.05  # of measuring one device, once it is warm
_LOOK_SECONDS = 0.5  # between two looks at the balance
_HOT_CELSIUS = 90.0
_ROLES: tuple[Role, ...] = ("prefill", "decode")


class DeferredEngine:
    """An engine that is opened when it is first needed: a device that stands by costs nothing.

    Parameters
    ----------
    device : Device
    opener : callable
        Gives the engine; what it raises, every use raises.
    """

    def __init__(self, device: Device, opener: Callable[[Device], Engine]) -> None:
        self.name = device.name
        self.device = device.word
        self._device = device
        self._open = opener
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    @property
    def trims(self) -> bool:
        """As the engine; opens it."""
        return self.opened().trims

    @property
    def types(self) -> Mapping[str, type[np.generic]]:
        """As the engine; opens it."""
        return self.opened().types

    def opened(self) -> Engine:
        """The engine itself."""
        with self._lock:
            if self._engine is None:
                self._engine = self._open(self._device)
            return self._engine

    @property
    def best(self) -> Engine:
        """The engine itself where it is open, and this one until then."""
        return self._engine or self

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], *, run_options: Any = None) -> npt.NDArray[Any]:
        """See `Engine.run`."""
        return self.opened().run(feeds, run_options=run_options)


class _Metered:
    """An engine in one role, whose steps the balancer is told of."""

    def __init__(self, engine: DeferredEngine, role: Role, device: Device, ids: str, placer: Placer) -> None:
        self.name = engine.name
        self.device = engine.device
        self._engine = engine
        self._role: Role = role
        self._device = device
        self._ids = ids
        self._placer = placer

    @property
    def trims(self) -> bool:
        return self._engine.trims

    @property
    def types(self) -> Mapping[str, type[np.generic]]:
        return self._engine.types

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], *, run_options: Any = None) -> npt.NDArray[Any]:
        balancer, clock = self._placer.balancer, self._placer.clock
        balancer.began(self._role, self._device)
        began, seconds = clock(), None
        try:
            logits = self._engine.run(feeds, run_options=run_options)
            seconds = clock() - began
        finally:
            balancer.ended(self._role, self._device, feeds[self._ids].shape[-1], seconds)
        self._placer.balance()
        return logits


class Placed(Protocol):
    """A session whose engines can be placed."""

    routes: Routes

    def apart(self, engine: Engine) -> DecoderSession:
        """The same model on one engine alone, over caches of its own."""
        ...


class Placer:
    """Puts engines into a session's routes, as a policy and the machine allow. Thread-safe.

    Parameters
    ----------
    opener : callable
        Opens the model on a device.
    ids : str
        The name of the graph's input of token ids.
    manager : DeviceManager, optional
    balancer : LoadBalancer, optional
        Moves roles that are auto.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        opener: Callable[[Device], Engine],
        ids: str,
        *,
        manager: DeviceManager | None = None,
        balancer: LoadBalancer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.manager = manager or DeviceManager()
        self.balancer = balancer or LoadBalancer(clock, too_hot=_too_hot)
        self.clock = clock
        self._open = opener
        self._ids = ids
        self._engines: dict[Device, DeferredEngine] = {}
        self._failed: dict[Device, str] = {}
        self._speeds: dict[Device, Speed] = {}
        self._asked: tuple[str, str, str] | None = None
        self._placement: Placement | None = None
        self._looked = clock()
        self._lock = threading.RLock()
        self.routes = Routes([self._engine(CPU)])
        self._session: Placed | None = None

    @property
    def placement(self) -> Placement | None:
        """What is in force; None before the first `follow`."""
        return self._placement

    def report(self) -> dict[str, Any] | None:
        """For metrics: the placement, the load of each device by role, the temperature; None before the first `follow`.

        `ms_per_token` and `temperature_c` are None where they are unknown; figures come only from roles that are auto.
        """
        placement = self._placement
        if placement is None:
            return None
        loads = []
        for device in placement.speeds:
            for role in _ROLES:
                load = self.balancer.load(role, device)
                milliseconds = None if load.seconds is None else 1000 * load.seconds
                loads.append(
                    {"device": device.name, "role": role, "ms_per_token": milliseconds, "running": load.running}
                )
        return {**placement.report(), "load": loads, "temperature_c": temperature()}

    def serve(self, session: Placed, policy: Policy) -> None:
        """Begin to place the engines of a session that has these `routes`.

        Raises
        ------
        ModelError
            If not even the processor runs the model.
        """
        self._session = session
        self.follow(policy)

    def follow(self, policy: Policy) -> None:
        """Bring the devices of a policy into force, from the next step on; what does not open is passed over.

        Raises
        ------
        ModelError
            If not even the processor runs the model; nothing is changed.
        """
        asked = asked_for(policy)
        with self._lock:
            if asked == self._asked:
                return
            self._failed.clear()  # asked again, tried again
            speeds = self._measured() if "auto" in asked[1:] else {}
            while True:
                placement = plan_placement(policy, self.manager, speeds=speeds, without=self._failed)
                wanted = dict.fromkeys((placement.prefill.device, placement.decode.device))
                if all(self._opens(device) for device in wanted):
                    break
            self._asked = asked
            self._put(placement)

    def balance(self) -> None:
        """Move a role that is auto, if another device has become clearly faster. Looks twice a second at most."""
        if self.clock() - self._looked < _LOOK_SECONDS or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = self.clock()
            placement = self._placement
            if placement is None:
                return
            for role in _ROLES:
                choice: Choice = getattr(placement, role)
                if choice.requested == "auto" and len(placement.speeds) > 1:
                    target = self.balancer.advise(role, choice.device, placement.speeds)
                    if isinstance(target, Device):
                        moved = Choice("auto", target, f"moved from {choice.device.name} by load")
                        placement = placement.moved(role, moved)
            if placement is not self._placement:
                self._put(placement)
        finally:
            self._lock.release()

    def _engine(self, device: Device) -> DeferredEngine:
        if device not in self._engines:
            self._engines[device] = DeferredEngine(device, self._open)
        return self._engines[device]

    def _opens(self, device: Device, speeds: dict[Device, Speed] | None = None) -> bool:
        """Whether it runs the model; measures it into `speeds` where these are given."""
        try:
            engine = self._engine(device).opened()
            if speeds is not None and self._session is not None:
                speeds[device] = measure_speed(self._session.apart(engine), self.clock)
        except (ModelError, ProviderError) as error:
            if device == CPU:
                raise
            self._failed[device] = " ".join(str(error).split())
            return False
        return True

    def _measured(self) -> dict[Device, Speed]:
        """Every device that runs the model, measured once; none where there is only the processor."""
        candidates = self.manager.candidates()
        if len(candidates) < 2:
            return {}
        for device in candidates:
            if device not in self._failed and device not in self._speeds:
                self._opens(device, self._speeds)
        return dict(self._speeds)

    def _put(self, placement: Placement) -> None:
        self._placement = placement
        for device, speed in placement.speeds.items():
            for role, milliseconds, tokens in (
                ("prefill", speed.prefill_ms, _PROMPT),
                ("decode", speed.decode_ms, 1),
            ):
                if self.balancer.load(role, device).seconds is None:
                    self.balancer.expect(role, device, milliseconds / 1000 / tokens)
        self.routes.place(
            prefill=self._order("prefill", placement.prefill, metered=len(placement.speeds) > 1),
            decode=self._order("decode", placement.decode, metered=len(placement.speeds) > 1),
        )

    def _order(self, role: Role, choice: Choice, *, metered: bool) -> Collection[Engine]:
        """The device in force, then those that take over where it fails: a GPU behind an NPU, the processor last."""
        order = [choice.device]
        if choice.device.kind == "npu":
            order.append(self.manager.choose("dml").device)
        order.append(CPU)
        devices = [device for device in dict.fromkeys(order) if device not in self._failed]
        engines = [(device, self._engine(device)) for device in devices]
        if not metered or choice.requested != "auto":
            return [engine.best for _, engine in engines]
        return [_Metered(engine, role, device, self._ids, self) for device, engine in engines]


def measure_speed(session: DecoderSession, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Time a short prompt and a few tokens, the best of a few rounds; the first only warms up.

    Parameters
    ----------
    session : DecoderSession
    clock : callable
        Seconds, monotonic.
    """
    tokens = max(2, min(_PROMPT, session.context_length - _STEPS))
    ids = np.arange(tokens + _STEPS, dtype=np.int64) % session.vocab_size
    prefill, decode = [], []
    spent = 0.0
    for number in range(_ROUNDS):
        sequence = session.sequence()
        try:
            times = [clock()]
            sequence.feed(ids[:tokens])
            times.append(clock())
            for token in ids[tokens:]:
                sequence.feed(token[None])
                times.append(clock())
        finally:
            sequence.close()
        if number:
            prefill.append(times[1] - times[0])
            decode.append(float(np.diff(times[1:]).min()))
            spent += times[-1] - times[0]
            if spent > _ENOUGH_SECONDS:
                break
    return Speed(1000 * min(prefill), 1000 * min(decode))


def _too_hot(device: Hashable) -> bool:
    """The processor's sensors are the only ones that are known."""
    if device != CPU:
        return False
    found = temperature()
    return found is not None and found >= _HOT_CELSIUS
