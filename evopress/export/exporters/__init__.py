"""The forms in which compressed models are written."""

from evopress.config.plugins import Registry
from evopress.export.base import Exporter
from evopress.export.exporters.archive import Archive
from evopress.export.exporters.compressed_tensors import CompressedTensors
from evopress.export.exporters.decilm import DeciLm
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace

EXPORTERS: Registry[Exporter] = Registry(
    "exporter", Exporter, HuggingFace, GgufFile, CompressedTensors, Archive, DeciLm
)
"""By `exporter`, or by the name alone, in the `exports` of a search."""
