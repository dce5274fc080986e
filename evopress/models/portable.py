"""A model folder that loads with the same function under transformers 4 and 5, on any machine.

transformers 5 keeps the parameters of rotary positions in `rope_parameters` and the type of the weights in `dtype`.
Version 4, which most servers run, passes over the former, takes its defaults, and computes something else without a
word. So the names of version 4 are written beside those of version 5, and only where version 5 reads the same from
both. A tokenizer gets a class that both versions have.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers import AutoTokenizer

from evopress.models.checkpoint import read_json
from evopress.models.skeleton import HOW_TO_COMPUTE, load_config
from evopress.util.errors import UnsupportedArchitectureError
from evopress.util.progress import log

_OF_THIS_MACHINE = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "is_local", "local_files_only", "cache_dir", "files_loaded"),
        *("device_map", "trust_remote_code", "token", "use_auth_token"),
    }
)
"""Where and how a config or a tokenizer was loaded before it was saved."""
_PLACES = ("_file", "_dir", "_path", "_folder")
"""How names of settings end that hold a path."""
_TYPE_OF_ROPE = ("rope_type", "type")
_TYPES_OF_VERSION_4 = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_OWN_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
"""What version 4 calls parameters of rotary positions where it does not call them as everywhere else."""
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_OF_PHI3 = ("short_factor", "long_factor")
"""All that version 4 takes in the `rope_scaling` of Phi-3, beside a type that it knows under its older name."""
_FAST = "PreTrainedTokenizerFast"
"""The class, in both versions, that takes tokenizer.json as it is."""


def make_portable(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Rewrite config.json, generation_config.json and tokenizer_config.json of a model folder, where that is needed.

    Raises:
        ModelError: one of the files is damaged.
        UnsupportedArchitectureError: transformers does not know the architecture.
    """
    _rewrite_config(folder, trust_remote_code)
    if (folder / "generation_config.json").exists():
        raw = read_json(folder / "generation_config.json")
        _write(folder / "generation_config.json", _without(raw, _OF_THIS_MACHINE | HOW_TO_COMPUTE), raw)
    if (folder / "tokenizer_config.json").exists():
        _rewrite_tokenizer(folder, trust_remote_code)


def portable_config(config: Mapping[str, Any], *, rope: bool = True) -> dict[str, Any]:
    """Content of config.json with the names of version 4, and without what only says how or where to compute.

    Args:
        config: content of config.json, or of one of its sections.
        rope: also add the names for rotary positions.
    """
    content = {
        key: portable_config(value, rope=rope) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in _without(config, _OF_THIS_MACHINE | HOW_TO_COMPUTE).items()
    }
    if isinstance(content.get("dtype"), str):
        content["torch_dtype"] = content["dtype"]
    return content | _rope_of_version_4(content) if rope else content


def portable_tokenizer_config(config: Mapping[str, Any], *, fast: bool) -> dict[str, Any]:
    """Content of tokenizer_config.json as both versions read it.

    Args:
        config: content as it is.
        fast: the folder has a tokenizer.json, which a class of both versions can take as it is.
    """
    content = _without(config, _OF_THIS_MACHINE)
    if isinstance(content.get("extra_special_tokens"), list):  # version 4 expects a mapping there, and fails
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    if fast and content.get("backend") == "tokenizers":  # version 5 wrote it
        del content["backend"]
        content["tokenizer_class"] = _FAST
    return content


def _rewrite_config(folder: Path, trust_remote_code: bool) -> None:
    path = folder / "config.json"
    raw = read_json(path)
    plain, content = portable_config(raw, rope=False), portable_config(raw)
    _write(path, plain, raw)
    if content == plain:
        return
    before = _rope(folder, trust_remote_code)
    _write(path, content, plain)
    try:
        same = _rope(folder, trust_remote_code) == before
    except UnsupportedArchitectureError:
        same = False
    if not same:
        _write(path, plain, content)
        log.warning(
            "config.json: transformers 4 has no names for these rotary positions, so load the model with version 5"
        )


def _rewrite_tokenizer(folder: Path, trust_remote_code: bool) -> None:
    path = folder / "tokenizer_config.json"
    raw = read_json(path)
    content = portable_tokenizer_config(raw, fast=(folder / "tokenizer.json").exists())
    if content == raw:
        return
    before = _tokenizer(folder, trust_remote_code)
    _write(path, content, raw)
    if _tokenizer(folder, trust_remote_code) != before:
        _write(path, portable_tokenizer_config(raw, fast=False), content)
        log.warning("tokenizer_config.json: transformers 4 may not have the class %s", raw.get("tokenizer_class"))


def _rope_of_version_4(section: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values under which version 4 looks for a section's parameters of rotary positions."""
    rope = section.get("rope_parameters")
    if not isinstance(rope, dict) or section.get("rope_scaling"):  # version 5, too, would take `rope_scaling`
        return {}
    names: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in rope.values()):  # by kind of layer, as in Gemma 3
        local, rope = rope.get(_LOCAL), rope.get(_GLOBAL)
        if not isinstance(local, dict) or not isinstance(rope, dict):
            return {}
        names["rope_local_base_freq"] = local.get("rope_theta")
    names |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    own = _OWN_NAMES.get(str(section.get("model_type")), {})
    names |= {own[key]: value for key, value in names.items() if key in own}
    kind = next((rope[key] for key in _TYPE_OF_ROPE if key in rope), "default")
    if kind not in _TYPES_OF_VERSION_4:
        return {}
    return names | _scaling_of_version_4(kind, rope, phi3=str(section.get("model_type")).startswith("phi3"))


def _scaling_of_version_4(kind: str, rope: Mapping[str, Any], *, phi3: bool) -> dict[str, Any]:
    """The setting `rope_scaling`, and what version 4 keeps beside it."""
    scaling = _without(rope, {"rope_theta", "partial_rotary_factor", *_TYPE_OF_ROPE})
    if kind == "default" and not scaling:
        return {"rope_scaling": None}  # said, since some architectures scale unless told otherwise
    original = "original_max_position_embeddings"
    beside = {original: scaling[original]} if kind == "longrope" and original in scaling else {}
    if phi3:
        return {"rope_scaling": {"type": kind, **{key: scaling.get(key) for key in _OF_PHI3}}, **beside}
    return {"rope_scaling": {"rope_type": kind, **scaling}, **beside}


def _rope(folder: Path, trust_remote_code: bool) -> Any:
    """Parameters of rotary positions as the version at hand reads them."""
    config = load_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    rope = getattr(config, "rope_parameters", None)
    return _without(rope, {"type"}) if isinstance(rope, dict) else rope


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """What decides a tokenizer's tokens, as the version at hand makes it; None where it cannot be made."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # foreign parsers meet foreign data; whoever loads the tokenizer next reports it
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend and backend.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template


def _without(settings: Mapping[str, Any], names: frozenset[str] | set[str]) -> dict[str, Any]:
    """Settings but those of these names, and but paths that name a place on one machine."""
    return {key: value for key, value in settings.items() if key not in names and not _is_place(key, value)}


def _is_place(key: str, value: Any) -> bool:
    if not isinstance(value, str) or not key.endswith(_PLACES):
        return False
    return value.startswith("~") or PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()


def _write(path: Path, content: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write JSON, unless the file says the same already."""
    if content != before:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
