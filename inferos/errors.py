"""The error tree. Each class also derives from the built-in a caller would expect.

::

    InferosError
    ├── ConfigError(ValueError)          an option is unknown, of the wrong type or out of range
    ├── ShapeError(ValueError)           sizes or dtypes that do not fit together
    ├── BudgetError(MemoryError)         the KV budget would be exceeded; nothing was changed
    ├── SequenceError(RuntimeError)      a call in the wrong order
    │   ├── ClosedError                  a closed or superseded handle
    │   ├── BusyError                    two threads on one sequence
    │   └── RewindError(ValueError)      a position that cannot be reached any more
    ├── QueueFullError(RuntimeError)     as many requests wait as may; nothing was queued
    ├── ContextError(ValueError)         a prompt longer than the model's context
    ├── ModelError(ValueError)           a folder or graph that is not a usable decoder model
    │   └── UnsupportedError             a form of attention we do not compute; names the node
    ├── TemplateError(ValueError)        a chat template that fails or misbehaves
    ├── SnapshotError(ValueError)        bytes that are not a valid snapshot
    └── ProviderError(RuntimeError)      an execution provider failed
        └── ProviderLost                 ... and is gone
"""

__all__ = [
    "BudgetError",
    "BusyError",
    "ClosedError",
    "ConfigError",
    "ContextError",
    "InferosError",
    "ModelError",
    "ProviderError",
    "ProviderLost",
    "QueueFullError",
    "RewindError",
    "SequenceError",
    "ShapeError",
    "SnapshotError",
    "TemplateError",
    "UnsupportedError",
]


class InferosError(Exception):
    """Base of everything inferos raises on purpose."""


class ConfigError(InferosError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class ShapeError(InferosError, ValueError):
    """Sizes or dtypes that do not fit together."""


class BudgetError(InferosError, MemoryError):
    """The KV budget would be exceeded; nothing was changed."""


class SequenceError(InferosError, RuntimeError):
    """A call on a sequence in the wrong order."""


class ClosedError(SequenceError):
    """A handle that is closed, unknown or of an older generation."""


class BusyError(SequenceError):
    """Two threads used one sequence at the same time."""


class RewindError(SequenceError, ValueError):
    """A position that cannot be reached any more."""


class QueueFullError(InferosError, RuntimeError):
    """As many requests wait as may; nothing was queued."""


class ContextError(InferosError, ValueError):
    """A prompt longer than the model's context."""


class ModelError(InferosError, ValueError):
    """A folder or graph that is not a usable decoder model."""


class UnsupportedError(ModelError):
    """A form of attention inferos does not compute; the message names the node."""


class TemplateError(InferosError, ValueError):
    """A chat template that fails, or does what a template may not."""


class SnapshotError(InferosError, ValueError):
    """Bytes that are not a valid snapshot."""


class ProviderError(InferosError, RuntimeError):
    """An execution provider failed."""


class ProviderLost(ProviderError):  # noqa: N818 - the contract's name
    """An execution provider failed and is gone."""
