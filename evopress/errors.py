"""Errors that a user can act on: each message names what is wrong, where, and what to do."""


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


class CompressionError(EvopressError):
    """A layer cannot be compressed as asked; the message names the layer."""


class SearchError(EvopressError):
    """A search cannot start or go on."""
