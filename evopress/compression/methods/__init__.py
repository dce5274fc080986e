"""The methods that make compressed variants."""

from typing import TYPE_CHECKING

from evopress.compression.base import Method
from evopress.compression.families import FAMILIES
from evopress.compression.methods.drop import Drop
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import Magnitude, SparseGpt, Wanda
from evopress.config.plugins import Registry

if TYPE_CHECKING:
    from evopress.compression.base import Format

METHODS: Registry[Method] = Registry("method", Method, Gptq, Gguf, SparseGpt, Wanda, Magnitude, Drop)
"""By `method` in the settings of variants."""


def register(method: type[Method], *formats: "type[Format]") -> None:
    """Add a method from outside of the package, its family if that is new, and the formats that only it uses."""
    from evopress.compression.formats import FORMATS

    METHODS.register(method)
    if method.family not in FAMILIES:
        FAMILIES.append(method.family)
    FORMATS.extend(formats)
