"""The layout of `DeciLMForCausalLM`, in which vLLM runs Llamas whose blocks lack modules, without their tensors.

The format is that of nvidia/Llama-3_1-Nemotron-51B-Instruct, read by vLLM's `model_executor/models/nemotron_nas.py`:
`block_configs` in config.json mark modules as `no_op`, and neither their linear layers nor the norms before them are
stored.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from evopress.compression.families import of_modules
from evopress.export.base import Exporter
from evopress.export.exporters.huggingface import SHARD_BYTES
from evopress.models.modules import ATTENTION, MLP
from evopress.util.errors import ArtifactError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from evopress.compression.dropped import Dropped
    from evopress.config.context import StageContext

_MODEL_TYPES = ("llama", "mistral")
"""Architectures that this model code computes exactly; Mistral without sliding windows."""
_TENSORS = {
    ATTENTION: ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    MLP: ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
"""Weights of each module, with the norm before it."""
_MULTIPLE = 256
"""What vLLM rounds the size of an MLP up to."""
_USAGE = """This folder has the layout of `DeciLMForCausalLM`, which vLLM runs: dropped modules are marked `no_op` in \
`block_configs`, take neither memory nor time, and their tensors are not stored. The attention of the first block is \
stored even where it is dropped, since that code needs attention there. vLLM has the model's code, but not the class \
of its config, which lies here (`configuration_decilm.py`):

```sh
vllm serve {folder} --trust-remote-code
```"""


class DeciLm(Exporter):
    """A Llama that lost modules as vLLM runs it, without their tensors."""

    of_dropped: ClassVar[bool] = True

    exporter: Literal["decilm"] = "decilm"
    shard_bytes: int = Field(SHARD_BYTES, ge=1, description="Bytes of weights that a file holds at most.")

    def write(self, context: "StageContext", search: str, folder: Path) -> None:
        """Write weights, config and everything else but the model card."""
        from evopress.artifacts.tables import LAYERS, read_table
        from evopress.compression.dropped import block_tensors
        from evopress.export.compressed import CompressedModel
        from evopress.export.folder import copy_companions, write_weights
        from evopress.models.skeleton import load_config
        from evopress.search.configuration import Configuration

        if not of_modules(Configuration.read(context.run, search).table).any():
            raise ArtifactError(f"{context.run.configuration(search)}: drops no modules, which this layout is for")
        model = CompressedModel(context, search)
        assert model.dropped is not None
        config = load_config(context.run.model, trust_remote_code=context.trust_remote_code)
        tensors = block_tensors(model.checkpoint, read_table(context.run.layers, LAYERS))
        require_plain_llama(config, {inner for _, inner in tensors.values()})
        absent = self.absent(model.dropped)
        left_out = {name for name, (block, inner) in tensors.items() if _is_absent(absent, block, inner)}
        names = {name: stored for name, stored in model.layout.names.items() if name not in left_out}
        copy_companions(context.run.model, folder)
        _write_config(folder, decilm_config(config, model.dropped, absent))
        write_weights(model.checkpoint, folder, names, model.weight, self.shard_bytes)

    def usage(self, folder: str) -> str:
        """With vLLM."""
        return _USAGE.format(folder=folder)

    def absent(self, dropped: "Dropped") -> "Dropped":
        """All that is dropped, but for the attention of the first block that is kept.

        vLLM's code opens the residual stream in the first block's attention: that one stays, with an output of zeros.
        """
        return replace(dropped, modules=dropped.modules - {(dropped.kept[0], ATTENTION)})


def decilm_config(config: Any, dropped: "Dropped", absent: "Dropped") -> dict[str, Any]:
    """Content of config.json, complete, so that it does not lean on the defaults of another class or version.

    Args:
        config: of the dense model (Llama or Mistral).
        dropped: what the configuration drops.
        absent: what is not stored.

    Raises:
        UnsupportedArchitectureError: vLLM would round the MLP's size to another.
    """
    from evopress.models.portable import portable_config

    content = {
        **config.to_dict(),
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "num_hidden_layers": len(dropped.kept),
        "block_configs": list(_block_configs(config, dropped, absent)),
    }
    return portable_config(content)


def _block_configs(config: Any, dropped: "Dropped", absent: "Dropped") -> Iterator[dict[str, dict[str, Any]]]:
    """Of each block that is kept; sizes of what is not there are null, as in the published models."""
    group = config.num_attention_heads // config.num_key_value_heads
    multiple = ffn_mult(config.intermediate_size, config.hidden_size)
    for block in dropped.kept:
        attention, mlp = ((block, kind) not in absent.modules for kind in (ATTENTION, MLP))
        yield {
            "attention": {
                "n_heads_in_group": group if attention else None,
                "no_op": not attention,
                "replace_with_linear": False,
            },
            "ffn": {"ffn_mult": multiple if mlp else None, "no_op": not mlp, "replace_with_linear": False},
        }


def ffn_mult(intermediate_size: int, hidden_size: int) -> float:
    """The factor from which vLLM works out an MLP's size: 2/3 of it times the hidden size, rounded up to 256s.

    Raises:
        UnsupportedArchitectureError: no factor gives this size.
    """
    factor = 3 * intermediate_size / (2 * hidden_size)
    rounded = -(-int(2 * factor * hidden_size / 3) // _MULTIPLE) * _MULTIPLE
    if rounded != intermediate_size:
        raise UnsupportedArchitectureError(
            f"intermediate_size {intermediate_size}: the layout of DeciLM knows multiples of {_MULTIPLE} only, and "
            f"vLLM would make it {rounded}; use the huggingface export"
        )
    return factor


def require_plain_llama(config: Any, inner: set[str]) -> None:
    """Check that vLLM's DeciLM computes what this model does.

    Args:
        config: of the dense model.
        inner: names of tensors inside blocks.

    Raises:
        UnsupportedArchitectureError: it does not; the message names what is in the way.
    """
    strange = sorted(inner - {f"{layer}.weight" for layers in _TENSORS.values() for layer in layers})
    reasons = {
        f"it is a {config.model_type}": config.model_type not in _MODEL_TYPES,
        f"its blocks have {', '.join(strange)}": bool(strange),
        "its activation is not silu": getattr(config, "hidden_act", None) != "silu",
        "it attends in sliding windows": getattr(config, "sliding_window", None) is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            name = (config.architectures or [config.model_type])[0]
            raise UnsupportedArchitectureError(
                f"{name}: the layout of DeciLM describes plain Llamas only, and {reason}; use the huggingface export"
            )


def _is_absent(absent: "Dropped", block: int, inner: str) -> bool:
    return any(
        (block, kind) in absent.modules and inner.startswith(tuple(f"{layer}." for layer in layers))
        for kind, layers in _TENSORS.items()
    )


def _write_config(folder: Path, content: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    code = Path(__file__).with_name("configuration_decilm.py")
    shutil.copyfile(code, folder / code.name)
