"""What a job would refuse and a dry run can tell: settings that do not fit the layers of a known kind of model.

Names and shapes of layers follow from the config of models that are built like Llama. Of others, whose layers only
torch would tell, nothing is foreseen: their jobs check the same.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from evopress.compression.base import LayerMethod
from evopress.config.data import FileText
from evopress.data.local import find_files
from evopress.plan.model_config import size
from evopress.util.errors import CompressionError, ConfigError
from evopress.workflow.settings import Settings
from evopress.workflow.slices import texts

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3", "olmo2", "granite")
_INPUTS = {
    "self_attn.q_proj": "hidden_size",
    "self_attn.k_proj": "hidden_size",
    "self_attn.v_proj": "hidden_size",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "hidden_size",
    "mlp.up_proj": "hidden_size",
    "mlp.down_proj": "intermediate_size",
}
"""Linear layers of a block, and what their inputs are as many as."""


_SPECIAL = 4
"""Tokens that may stand around a document, at most."""


def require_fit(settings: Settings, config: Mapping[str, Any]) -> None:
    """Check settings against what is known of the model and of local text.

    Args:
        settings: the run.
        config: of the model (`model_config`); may be empty.

    Raises:
        ConfigError: they do not fit; one line each.
    """
    layers = known_layers(config)
    problems = [*_short_texts(settings)]
    if layers:
        for name, variants in settings.variants.items():
            where = f"variants.{name}"
            if not isinstance(variants, LayerMethod):
                modules = list(dict.fromkeys(_module(layer) for layer in layers))
                problems += _unmatched(f"{where}.exclude", variants.exclude, modules, "module")
                continue
            problems += _unmatched(f"{where}.exclude", variants.exclude, list(layers), "layer")
            problems += _unsuitable(where, variants, layers)
    if problems:
        raise ConfigError("\n".join(problems))


def known_layers(config: Mapping[str, Any]) -> dict[str, int]:
    """Inputs of each linear layer by name; empty where the config does not tell."""
    blocks, hidden, heads = (size(config, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    known = config.get("model_type") in _LIKE_LLAMA and not config.get("num_experts") and "auto_map" not in config
    if not (known and blocks and hidden and heads and size(config, "intermediate_size")):
        return {}
    sizes = {
        "hidden_size": hidden,
        "attention": heads * (size(config, "head_dim") or hidden // heads),
        "intermediate_size": size(config, "intermediate_size") or 0,
    }
    return {
        f"model.layers.{block}.{layer}": sizes[inputs] for block in range(blocks) for layer, inputs in _INPUTS.items()
    }


def _module(layer: str) -> str:
    """Name of the module that a layer belongs to, as depth pruning has it."""
    block, _, module = layer.rpartition(".")[0].rpartition(".")
    return f"{block}.{'attn' if module == 'self_attn' else 'mlp'}"


def _unmatched(where: str, patterns: tuple[str, ...], names: list[str], what: str) -> Iterator[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"{where}: {pattern!r} matches no {what}; names look like {names[0]!r}"


def _unsuitable(where: str, variants: LayerMethod, layers: Mapping[str, int]) -> Iterator[str]:
    """The first layer that cannot have the levels, as all blocks are alike."""
    included = {name: inputs for name, inputs in layers.items() if not variants.excludes(name)}
    for name, inputs in included.items():
        try:
            variants.check_inputs(inputs, list(included.values()))
        except CompressionError as error:
            yield f"{where}: {name}: {error}"
            return


def _short_texts(settings: Settings) -> Iterator[str]:
    """Local texts that cannot hold the tokens asked for: no token is shorter than a byte, special ones apart."""
    for name, text in texts(settings).items():
        if not isinstance(text, FileText) or text.tokens is None:
            continue
        files = find_files(text.path)
        if any(path.suffix != ".txt" for path in files):
            continue  # compressed, or with more around it than the file holds
        special = _SPECIAL * len(files) + text.tokens // text.sequence_length
        most = sum(path.stat().st_size for path in files) + special
        if text.tokens > most:
            where = f"data.{name}" if name in ("calibration", "search") else f"data.evaluation.{name}"
            yield f"{where}: {text.path} holds fewer than {text.tokens} tokens ({most} bytes); lower tokens or add text"
