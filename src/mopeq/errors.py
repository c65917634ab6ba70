"""The exceptions of mopeq.

::

    MopeqError                 everything below; the CLI prints it as one sentence
    |-- InputError             exit code 2: what the user gave cannot be used
    |   |-- ModelError         the model folder: missing, damaged, dense, unknown architecture, NaN weights
    |   |-- DataError          calibration or evaluation data: missing, empty, unreadable
    |   |-- MapError           a precision map or statistics file: malformed, or made for another model
    |   |-- BudgetError        a budget outside what the options can reach
    |   `-- OutputError        the output folder: exists already, not writable, disk full
    `-- CheckpointError        exit code 1: a packed checkpoint that breaks docs/format.md

Every message says what was found, what was expected and what to do.
"""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "InputError",
    "MapError",
    "ModelError",
    "MopeqError",
    "OutputError",
]


class MopeqError(Exception):
    """Base of all errors that mopeq raises on purpose."""

    exit_code = 1


class InputError(MopeqError):
    """What the user gave cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """The model cannot be understood or read."""


class DataError(InputError):
    """Calibration or evaluation data cannot be used."""


class MapError(InputError):
    """A precision map or a statistics file is malformed or belongs to another model."""


class BudgetError(InputError):
    """The budget is outside what the options can reach."""


class OutputError(InputError):
    """The output cannot be written."""


class CheckpointError(MopeqError):
    """A packed checkpoint breaks the format."""
