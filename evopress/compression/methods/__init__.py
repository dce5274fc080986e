"""The methods that make compressed variants."""

from evopress.compression.base import Method
from evopress.compression.methods.drop import Drop
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.magnitude import Magnitude
from evopress.compression.methods.sparsegpt import SparseGpt
from evopress.compression.methods.wanda import Wanda
from evopress.config.plugins import Registry

METHODS: Registry[Method] = Registry("method", Method, Gptq, SparseGpt, Wanda, Magnitude, Drop)
"""By `method` in the settings of variants."""
