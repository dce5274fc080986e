"""The methods that make compressed variants."""

from evopress.compression.base import Method
from evopress.compression.settings import (
    DropSettings,
    GptqSettings,
    MagnitudeSettings,
    SparseGptSettings,
    WandaSettings,
)
from evopress.config.plugins import Registry

METHODS: Registry[Method] = Registry(
    "method", Method, GptqSettings, SparseGptSettings, WandaSettings, MagnitudeSettings, DropSettings
)
"""By `method` in the settings of variants."""
