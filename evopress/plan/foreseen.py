"""What a job would refuse and a dry run can tell: settings that do not fit the layers of a known kind of model.

Names and shapes of layers follow from the config of models that are built like Llama. Of others, whose layers only
torch would tell, nothing is foreseen: their jobs check the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evopress.artifacts.paths import Run
from evopress.compression.base import LayerShape, Method
from evopress.config.data import FileText
from evopress.config.model import FolderModel, HubModel
from evopress.data.local import find_files
from evopress.plan.model_config import dense_sizes, size, source_bytes
from evopress.search.target import SizeTarget, require_below_source
from evopress.util.errors import CompressionError, ConfigError
from evopress.workflow.searches import written_name
from evopress.workflow.settings import Settings
from evopress.workflow.slices import texts

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3", "olmo2", "granite")
_SHAPES = {
    "self_attn.q_proj": ("attention", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "attention"),
    "mlp.gate_proj": ("intermediate", "hidden"),
    "mlp.up_proj": ("intermediate", "hidden"),
    "mlp.down_proj": ("hidden", "intermediate"),
}
"""Linear layers of a block, with what their rows and columns are as many as."""


_SPECIAL = 4
"""Tokens that may stand around a document, at most."""


def require_fit(settings: Settings, config: Mapping[str, Any], run: Run | None = None) -> None:
    """Check settings against what is known of the model, of local text, and of what is installed.

    Args:
        settings: the run.
        config: of the model (`model_config`); may be empty.
        run: its folder, where a model may be prepared.

    Raises:
        ConfigError: they do not fit; one line each.
    """
    layers = known_layers(config)
    problems = [*_short_texts(settings), *_unwritable(settings, config, layers)]
    problems += _not_below_source(settings, run or Run(Path("results") / settings.name))
    if settings.evaluation.runtime is not None:
        problems += _missing_runtime()
    if layers:
        for name, method in settings.variants.items():
            problems += _unfit(f"variants.{name}", method, layers)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))  # repetitions of a search share theirs


def _missing_runtime() -> Iterator[str]:
    from evopress.evaluation.llama_cpp import NOT_INSTALLED, is_installed

    if not is_installed():
        yield f"evaluation.runtime: {NOT_INSTALLED}"


def _not_below_source(settings: Settings, run: Run) -> Iterator[str]:
    """Sizes that are not below that of the quantized file which the model comes from."""
    source = source_bytes(settings.model, run)
    if source is None:
        return
    for name, search in settings.searches.items():
        target = search.target
        if not isinstance(target, SizeTarget):
            continue
        sizes = (0, 0) if target.bytes is not None else dense_sizes(settings.model, run)
        if sizes is None:
            continue
        try:
            limit = target.limit(*sizes)
            require_below_source(target, limit, source, f"searches.{written_name(name, search)}.target")
        except ConfigError as error:
            yield str(error)


def known_layers(config: Mapping[str, Any]) -> list[LayerShape]:
    """Linear layers of a model; none where the config does not tell."""
    blocks, hidden, heads = (size(config, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    intermediate = size(config, "intermediate_size")
    known = config.get("model_type") in _LIKE_LLAMA and not config.get("num_experts") and "auto_map" not in config
    if not (known and blocks and hidden and heads and intermediate):
        return []
    head = size(config, "head_dim") or hidden // heads
    keys = head * (size(config, "num_key_value_heads") or heads)
    sizes = {"hidden": hidden, "attention": heads * head, "keys": keys, "intermediate": intermediate}
    return [
        LayerShape(f"model.layers.{block}.{layer}", block, layer, layer, sizes[rows], sizes[columns], itemsize=2)
        for block in range(blocks)
        for layer, (rows, columns) in _SHAPES.items()
    ]


def _unfit(where: str, method: Method, layers: Sequence[LayerShape]) -> Iterator[str]:
    """Patterns of a method that match nothing, and layers that cannot have its levels."""
    names, what = [layer.name for layer in layers], "layer"
    if method.compresses_embedding:
        names += ["model.embed_tokens", "lm_head"]
    if method.family.takes_modules:
        names, what = list(dict.fromkeys(map(_module, names))), "module"
    yield from _unmatched(f"{where}.exclude", method.exclude, names, what)
    included = [layer for layer in layers if not method.excludes(layer.name)]
    try:
        method.check(included, included)
    except CompressionError as error:
        yield f"{where}: {error}"


def _unwritable(settings: Settings, config: Mapping[str, Any], layers: Sequence[LayerShape]) -> Iterator[str]:
    """Models that an export cannot hold."""
    dtype = _dtype(settings, config)
    model_type = config.get("model_type") if isinstance(settings.model, FolderModel | HubModel) else None
    for name, search in settings.searches.items():
        where = f"searches.{written_name(name, search)}.exports"
        for exporter in settings.exports_of(name):
            yield from exporter.unfit(where, settings.variants[search.variants], layers, dtype, model_type)


def _dtype(settings: Settings, config: Mapping[str, Any]) -> str | None:
    """Type of the model's weights; None where neither settings nor config tell."""
    model = settings.model
    if model.dtype != "source":
        return model.dtype
    if not isinstance(model, FolderModel | HubModel):
        return "bfloat16"  # `source` of a GGUF file
    return config.get("dtype") or config.get("torch_dtype")


def _module(layer: str) -> str:
    """Name of the module that a layer belongs to, as depth pruning has it."""
    block, _, module = layer.rpartition(".")[0].rpartition(".")
    return f"{block}.{'attn' if module == 'self_attn' else 'mlp'}"


def _unmatched(where: str, patterns: tuple[str, ...], names: list[str], what: str) -> Iterator[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"{where}: {pattern!r} matches no {what}; names look like {names[0]!r}"


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
