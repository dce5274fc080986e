"""The tokenizer that a GGUF file describes, as an ordinary tokenizer.json."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_pretokenizers import DEFAULT, PRETOKENIZERS, Pretokenizer
from evopress.util.errors import ModelError, brief
from evopress.util.progress import log

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_CONTROL, _USER_DEFINED = 3, 4
_HONOURED = {
    *("model", "pre", "tokens", "token_type", "scores", "merges", "token_type_count"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
}
_NEUTRAL = {"add_sep_token": False, "remove_extra_whitespaces": False, "normalizer.lowercase": False}
"""Values at which a key changes nothing."""
_SPACE = "▁"
_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is, in every version of transformers; what version 5 writes, only itself knows."""


def save_tokenizer(gguf: Path, folder: Path, rows: int) -> None:
    """Write tokenizer.json, its settings and the chat templates to ``folder``.

    Args:
        gguf: file with the whole tokenizer.
        folder: where to.
        rows: tokens that the model has an embedding for.

    Raises:
        ModelError: the tokenizer is of a kind, or has a setting, that cannot be had; it is named. Or it is damaged.
    """
    header = read_gguf_header(gguf, whole="tokenizer.")
    keys = {key.removeprefix(_PREFIX): value for key, value in header.metadata.items() if key.startswith(_PREFIX)}
    try:
        _check(keys, rows)
        tokenizer = _build(gguf, keys)
        tokens = keys["tokens"]
        special = {
            f"{name}_token": tokens[keys[f"{key}_token_id"]]
            for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
            if f"{key}_token_id" in keys
        }
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            chat_template=_chat_templates(header.metadata),
            **special,
        )
    except ModelError as error:
        raise ModelError(f"{gguf}: {error}") from error
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{gguf}: its tokenizer cannot be read ({brief(error)})") from error
    _save(wrapped, folder, len(tokens))


def _check(keys: Mapping[str, Any], rows: int) -> None:
    for key, value in sorted(keys.items()):
        known = key in _HONOURED or key.endswith(("_token_id", "_token_ids"))
        if not known and not (key in _NEUTRAL and value == _NEUTRAL[key]):
            raise ModelError(
                f"{_PREFIX}{key} is {str(value)[:40]}, which cannot be had from GGUF; give the model's own tokenizer "
                "with its safetensors"
            )
    tokens = keys.get("tokens")
    if not isinstance(tokens, list):
        raise ModelError(f"has no {_PREFIX}tokens; it comes without a tokenizer")
    if len(tokens) > rows:
        raise ModelError(f"{_PREFIX}tokens has {len(tokens)}, and the model embeddings for {rows}; fetch it again")
    for key, value in keys.items():
        if key.endswith("_token_id") and not 0 <= value < len(tokens):
            raise ModelError(f"{_PREFIX}{key} is {value}, and there are {len(tokens)} tokens; fetch it again")


def _build(gguf: Path, keys: Mapping[str, Any]) -> Tokenizer:
    kind = keys.get("model")
    if kind == "gpt2":
        pretokenizer = _pretokenizer(keys)
        tokenizer, adds_bos = _byte_level(keys, pretokenizer), pretokenizer.adds_bos
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(gguf, keys), True
    else:
        raise ModelError(
            f"{_PREFIX}model is {kind!r}: a tokenizer of this kind is not supported from GGUF (`gpt2` and `llama` "
            "are); give the model's safetensors"
        )
    _mark_ends(tokenizer, keys, adds_bos)
    return tokenizer


def _pretokenizer(keys: Mapping[str, Any]) -> Pretokenizer:
    name = keys.get("pre")
    if name is None:
        log.warning("the file does not name its pre-tokenizer (%spre): taken as `default`", _PREFIX)
        return DEFAULT
    if name not in PRETOKENIZERS:
        raise ModelError(
            f"{_PREFIX}pre is {name!r}, a pre-tokenizer that is not known here, so texts would be cut wrongly; give "
            f"the model's safetensors, or, where it cuts text like another, that one's name: `gguf_new_metadata.py "
            f"--pre-tokenizer NAME` of the package gguf writes it. Known are {', '.join(sorted(PRETOKENIZERS))}"
        )
    return PRETOKENIZERS[name]


def _byte_level(keys: Mapping[str, Any], pretokenizer: Pretokenizer) -> Tokenizer:
    tokens = keys["tokens"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ModelError(f"{_PREFIX}tokens has a token twice; fetch it again")
    merges = [tuple(merge.split(" ")) for merge in keys.get("merges", ())]
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pretokenizer.whole_words)
    tokenizer = Tokenizer(model)
    if (normalizer := pretokenizer.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pretokenizer.make()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = keys.get("token_type", ())
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _sentencepiece(gguf: Path, keys: Mapping[str, Any]) -> Tokenizer:
    architecture, described, _ = get_gguf_tokenizer(str(gguf))
    tokenizer, _ = convert_gguf_tokenizer(architecture, described)
    if (prefix := keys.get("add_space_prefix")) is not None:
        _set_space_prefix(tokenizer, prefix)
    return tokenizer


def _set_space_prefix(tokenizer: Tokenizer, prefix: bool) -> None:
    """Begin texts with a space, or do not; some models do so in the normalizer, others in the pre-tokenizer."""
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    else:
        spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *spaces] if prefix else spaces)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _mark_ends(tokenizer: Tokenizer, keys: Mapping[str, Any], adds_bos: bool) -> None:
    """Put the start and the end token around texts, as the file or the kind of tokenizer has it."""
    ends = {}
    for name, default in (("bos", adds_bos), ("eos", False)):
        id, asked = keys.get(f"{name}_token_id"), keys.get(f"add_{name}_token")
        if asked and id is None:
            raise ModelError(f"{_PREFIX}add_{name}_token is true, and {_PREFIX}{name}_token_id is missing")
        if id is not None and (default if asked is None else asked):
            ends[name] = (keys["tokens"][id], id)
    if ends:
        start, end = ([ends[name][0]] if name in ends else [] for name in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end], special_tokens=list(ends.values())
        )


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name."""
    found = {}
    for key, template in metadata.items():
        if key != _TEMPLATE and not key.startswith(f"{_TEMPLATE}."):
            continue
        name = key.removeprefix(_TEMPLATE).removeprefix(".") or "default"
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise ModelError(f"{key!r}: its name cannot be that of a file; do not trust this model")
        found[name] = template
    return found.get("default") if set(found) <= {"default"} else found


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path, tokens: int) -> None:
    """Write the tokenizer without what transformers adds past the file's own tokens: they have no embedding."""
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    told = {**json.loads(settings.read_text(encoding="utf-8")), "tokenizer_class": _CLASS}
    settings.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] < tokens]
    if len(kept) < len(content["added_tokens"]):
        text = json.dumps({**content, "added_tokens": kept}, ensure_ascii=False, indent=2)
        path.write_text(text, encoding="utf-8")
