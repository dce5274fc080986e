"""Errors that a user can act on: each message names what is wrong, where, and what to do."""

from collections.abc import Mapping
from pathlib import Path

INTERRUPTED = 130
"""Exit code of a process that Ctrl-C has ended, as shells have it."""


class EvopressError(Exception):
    """Base of every error that is reported as one line, without a traceback."""


class ConfigError(EvopressError):
    """The settings are wrong; the message starts with the dotted path of the setting."""


class ModelError(EvopressError):
    """A model cannot be found, read or trusted."""


class UnsupportedArchitectureError(ModelError):
    """The model loads, but its blocks or linear layers cannot be handled; the message names the architecture."""


class DataError(EvopressError):
    """Text or tokens are missing, empty or too few."""


class ArtifactError(EvopressError):
    """An artifact is missing, damaged, unwritable, or made by other settings."""


class DamagedError(ArtifactError):
    """An artifact was cut short or changed after it was written; ``evopress.artifacts.manifest`` makes these."""

    def __init__(self, problem: str, files: Mapping[Path, tuple[int, ...]]) -> None:
        names = " and ".join(map(str, files)) or "it"
        super().__init__(f"{problem}; delete {names} and run again to remake it")
        self.problem = problem
        """Which artifact it is, and what is wrong with it."""
        self.files = files
        """What must go for it to be remade, and what tells each file from one that has taken its place since."""


class CompressionError(EvopressError):
    """A layer cannot be compressed as asked; the message names the layer."""


class SearchError(EvopressError):
    """A search cannot start or go on."""


def brief(error: BaseException) -> str:
    """First line of what a foreign exception says, as some go on for pages."""
    return (str(error).splitlines() or [type(error).__name__])[0]
