"""What a job would refuse and a dry run can tell: settings that do not fit the layers of a known kind of model.

Names and shapes of layers follow from the config of models that are built like Llama. Of others, whose layers only
torch would tell, nothing is foreseen: their jobs check the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from evopress.artifacts.paths import Run
from evopress.compression.base import LayerMethod, Method
from evopress.compression.layers import LayerShape
from evopress.config.data import FileText
from evopress.data.documents import TEXT_SUFFIXES, find_files
from evopress.models.config_file import dense_sizes, size, source_bytes
from evopress.search.target import SizeTarget, megabytes, require_below_source
from evopress.util.errors import CompressionError, ConfigError
from evopress.workflow.searches import written_name
from evopress.workflow.settings import Settings
from evopress.workflow.slices import text_setting, texts

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
    problems = [*_short_texts(settings)]
    for name, method in settings.variants.items() if layers else ():
        problems += _unfit(f"variants.{name}", method, layers)
    if not problems:  # else levels of these variants cannot be told
        problems += [
            *_unwritable(settings, config, layers),
            *_too_close(settings, layers),
            *_too_small(settings, layers),
        ]
    problems += _not_below_source(settings, run or Run(Path("results") / settings.name))
    if settings.evaluation.runtime is not None:
        problems += _missing_runtime()
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


def _too_close(settings: Settings, layers: Sequence[LayerShape]) -> Iterator[str]:
    """Sizes of a front that no step of a layer lies between, so that they would be one file."""
    for name, search in settings.searches.items():
        methods, sizes = [settings.variants[source] for source in search.sources], search.sizes_wanted()
        steps = [
            _smallest_step(method, layer, search.levels)
            for method in methods
            if isinstance(method, LayerMethod)
            for layer in layers
            if not method.excludes(layer.name)
        ]
        step = min(steps, default=0)
        for lower, upper in pairwise(sizes):
            if upper - lower < step:
                yield (
                    f"searches.{written_name(name, search)}.sizes: {megabytes(lower)} and {megabytes(upper)} are "
                    f"closer than the smallest step between two levels of a layer ({step:,} bytes); name sizes further "
                    "apart"
                )


def _too_small(settings: Settings, layers: Sequence[LayerShape]) -> Iterator[str]:
    """Files that the layers alone outgrow, each at its lowest level; layers that stay dense are not counted."""
    for name, search in settings.searches.items():
        target, methods = search.target, [settings.variants[source] for source in search.sources]
        if not isinstance(target, SizeTarget) or target.bytes is None:
            continue
        if not all(isinstance(method, LayerMethod) for method in methods):
            continue  # modules may go
        least = sum(_least_bytes(methods, layer, search.levels) for layer in layers)
        if target.bytes < least:
            where, size = f"searches.{written_name(name, search)}.target", megabytes(target.bytes)
            yield (
                f"{where}: {size} is below what the linear layers alone take at their lowest levels "
                f"({megabytes(least)}); choose a larger size, or offer lower levels"
            )


def _least_bytes(methods: Sequence[Method], layer: LayerShape, labels: Sequence[str] | None) -> int:
    """Bytes of the lowest level that any method offers a layer; 0 where one leaves it dense."""
    sizes = [
        level.bytes
        for method in methods
        if isinstance(method, LayerMethod) and not method.excludes(layer.name)
        for level in method.levels_of(layer)
        if labels is None or level.label in labels
    ]
    return min(sizes, default=0)


def _smallest_step(method: LayerMethod, layer: LayerShape, labels: Sequence[str] | None) -> int:
    """Fewest bytes between two levels of a layer, of those with ``labels`` (None: all)."""
    sizes = sorted({level.bytes for level in method.levels_of(layer) if labels is None or level.label in labels})
    return min((upper - lower for lower, upper in pairwise(sizes)), default=0)


def _unwritable(settings: Settings, config: Mapping[str, Any], layers: Sequence[LayerShape]) -> Iterator[str]:
    """Models that an export cannot hold."""
    dtype = _dtype(settings, config)
    model_type = None if settings.model.quantized else config.get("model_type")
    for name, search in settings.searches.items():
        where = f"searches.{written_name(name, search)}.exports"
        for method in map(settings.variants.__getitem__, search.sources):
            for exporter in settings.exports_of(name):
                yield from exporter.unfit(where, method, layers, dtype, model_type)


def _dtype(settings: Settings, config: Mapping[str, Any]) -> str | None:
    """Type of the model's weights; None where neither settings nor config tell."""
    model = settings.model
    if model.dtype != "source":
        return model.dtype
    if model.quantized:
        return "bfloat16"  # as a GGUF file does not tell
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
        if any(path.suffix not in TEXT_SUFFIXES for path in files):
            continue  # compressed, or with more around it than the file holds
        special = _SPECIAL * len(files) + text.tokens // text.sequence_length
        most = sum(path.stat().st_size for path in files) + special
        if text.tokens > most:
            where = text_setting(name)
            yield f"{where}: {text.path} holds fewer than {text.tokens} tokens ({most} bytes); lower tokens or add text"
