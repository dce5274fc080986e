"""The layout of `DeciLMForCausalLM`, in which vLLM runs Llamas whose blocks lack modules, without their tensors.

The format is that of nvidia/Llama-3_1-Nemotron-51B-Instruct, read by vLLM's `model_executor/models/nemotron_nas.py`:
`block_configs` in config.json mark modules as `no_op`, and neither their linear layers nor the norms before them are
stored.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evopress.artifacts.atomic import atomic_folder
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.stitched import file_digests, write_folder_manifest
from evopress.artifacts.tables import LAYERS, read_table
from evopress.compression.dropped import Dropped, block_tensors
from evopress.compression.size import Depth, size_of
from evopress.export import configuration_decilm
from evopress.export.card import render_card
from evopress.export.depth_card import DepthFolder
from evopress.export.files import copy_companions
from evopress.export.layout import Layout, depth_layout
from evopress.export.run import SHARD_BYTES, replacement, stored_choices
from evopress.export.shards import write_weights
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import ATTENTION, MLP
from evopress.models.portable import portable_config
from evopress.models.skeleton import load_config
from evopress.search.configuration import read_configuration
from evopress.util.errors import ArtifactError, UnsupportedArchitectureError
from evopress.util.progress import log

_MODEL_TYPES = ("llama", "mistral")
"""Architectures that this model code computes exactly; Mistral without sliding windows."""
_TENSORS = {
    ATTENTION: ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    MLP: ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
"""Weights of each module, with the norm before it."""
_MULTIPLE = 256
"""What vLLM rounds the size of an MLP up to."""


def write_decilm(run: Run, search: str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``run.decilm(search)``, the card included, and then its manifest.

    Raises:
        ArtifactError: the configuration drops no module, or is missing, damaged or of another model.
        ModelError: the dense checkpoint is damaged.
        UnsupportedArchitectureError: the model is no Llama that this layout can describe.
    """
    configuration = read_configuration(run, search)
    depth = size_of(run, configuration).depth
    if depth is None:
        raise ArtifactError(f"{run.configuration(search)}: drops no modules, which this layout is for")
    checkpoint, layers = Checkpoint(run.model), read_table(run.layers, LAYERS)
    config = load_config(run.model)
    tensors = block_tensors(checkpoint, layers)
    require_plain_llama(config, {inner for _, inner in tensors.values()})
    absent = absent_modules(depth.dropped)
    plain = depth_layout(checkpoint, layers, depth.dropped, config.hidden_size)
    left_out = {name for name, (block, inner) in tensors.items() if _is_absent(absent, block, inner)}
    layout = Layout({name: new for name, new in plain.names.items() if name not in left_out}, plain.zeroed - left_out)
    choices = stored_choices(checkpoint, configuration, run.configuration(search))
    run.decilm_manifest(search).unlink(missing_ok=True)
    with atomic_folder(run.decilm(search)) as folder:
        copy_companions(run.model, folder)
        _write_config(folder, decilm_config(config, depth.dropped, absent))
        write_weights(checkpoint, folder, layout.names, replacement(run, choices, layout.zeroed), shard_bytes)
        _write_card(run, search, folder, depth, absent)
        files = file_digests(folder)
    provenance = Provenance("decilm", json.dumps({"shard_bytes": shard_bytes}), read_model_fingerprint(run))
    write_folder_manifest(run.decilm_manifest(search), search, files, provenance)
    log.info("%s: %d blocks, %d modules left out", run.decilm(search), len(depth.dropped.kept), len(absent.modules))


def absent_modules(dropped: Dropped) -> Dropped:
    """What need not be stored: all that is dropped, but for the attention of the first block that is kept.

    vLLM's code opens the residual stream in the first block's attention, so that one stays, with an output of zeros.
    """
    return Dropped(dropped.modules - {(dropped.kept[0], ATTENTION)}, dropped.all_modules)


def decilm_config(config: Any, dropped: Dropped, absent: Dropped) -> dict[str, Any]:
    """Content of config.json, complete, so that it does not lean on the defaults of another class or version.

    Args:
        config: of the dense model (Llama or Mistral).
        dropped: what the configuration drops.
        absent: what is not stored.

    Raises:
        UnsupportedArchitectureError: vLLM would round the MLP's size to another.
    """
    content = {
        **config.to_dict(),
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "num_hidden_layers": len(dropped.kept),
        "block_configs": list(_block_configs(config, dropped, absent)),
    }
    return portable_config(content)


def _block_configs(config: Any, dropped: Dropped, absent: Dropped) -> Iterator[dict[str, dict[str, Any]]]:
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
            f"vLLM would make it {rounded}; use the folder in models/"
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
                f"{name}: the layout of DeciLM describes plain Llamas only, and {reason}; use the folder in models/"
            )


def _is_absent(absent: Dropped, block: int, inner: str) -> bool:
    return any(
        (block, kind) in absent.modules and inner.startswith(tuple(f"{layer}." for layer in layers))
        for kind, layers in _TENSORS.items()
    )


def _write_config(folder: Path, content: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    code = Path(configuration_decilm.__file__)
    shutil.copyfile(code, folder / code.name)


def _write_card(run: Run, search: str, folder: Path, depth: Depth, absent: Dropped) -> None:
    stored = sum(Checkpoint(folder).elements().values())
    text = render_card(run, search, DepthFolder(depth, absent, stored, decilm=True))
    (folder / "README.md").write_text(text, encoding="utf-8")
