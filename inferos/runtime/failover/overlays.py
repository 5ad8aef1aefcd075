"""Policy changes that hold for a while, one on top of the other, and leave what a person sets in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from inferos.config import Policy

__all__ = ["Overlays", "PolicyTarget"]

_Path = tuple[str, str]  # section and key
_Changes = Mapping[str, Mapping[str, Any]]


class PolicyTarget(Protocol):
    """Where the policy in force is kept; `inferos.kv.policy.PolicyStore` is meant."""

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        ...

    def update(self, changes: Mapping[str, Any], reason: str) -> int:
        """Merge changes into it; the new version's number. Raises ConfigError where refused."""
        ...


class Overlays:
    """Keeps the policy at what it was, plus the changes in force. Used by one thread at a time."""

    def __init__(self, target: PolicyTarget) -> None:
        self._target = target
        self._base: dict[_Path, Any] = {}  # what stands below the changes
        self._put: dict[_Path, Any] = {}  # what was put there

    def apply(self, changes: Iterable[_Changes], reason: str) -> int | None:
        """Put these changes in force and no others, a later one over an earlier; the new version, if there is one."""
        policy = self._target.policy
        wanted: dict[_Path, Any] = {}
        for layer in changes:
            wanted.update({(section, key): value for section, keys in layer.items() for key, value in keys.items()})
        new: dict[_Path, Any] = {}
        for path in {**self._put, **wanted}:
            held = _held(policy, path)
            touched = path in self._put and held != self._put[path]  # by somebody, since it was put there
            if touched or path not in self._put:
                self._base[path] = held
            new[path] = wanted.get(path, self._base[path])
            if touched and new[path] == self._put[path]:
                new[path] = held
        different = {path: value for path, value in new.items() if _held(policy, path) != value}
        version = self._target.update(_nested(different), reason) if different else None
        self._put = wanted
        self._base = {path: value for path, value in self._base.items() if path in wanted}
        return version


def _held(policy: Policy, path: _Path) -> Any:
    section, key = path
    value = getattr(getattr(policy, section), key)
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value


def _nested(values: Mapping[_Path, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for (section, key), value in values.items():
        changes.setdefault(section, {})[key] = value
    return changes
