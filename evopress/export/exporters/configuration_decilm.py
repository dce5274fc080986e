"""Config of a Llama some of whose blocks lack their attention or their MLP; vLLM has the model that goes with it.

This file lies in the model's folder, where `trust_remote_code` finds it, and needs nothing but transformers.
"""

from typing import Any

from transformers import LlamaConfig


class Section(dict[str, Any]):
    """A mapping whose entries are attributes too, as vLLM reads them; being a dict, it is saved as JSON."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    """A Llama config with `block_configs`: for each block, `attention` and `ffn` with `no_op` and sizes."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, dict[str, Any]]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            Section({part: Section(values) for part, values in block.items()}) for block in block_configs or []
        ]
