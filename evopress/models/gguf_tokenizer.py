"""The tokenizer that a GGUF file describes, as an ordinary tokenizer.json."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from evopress.models.gguf_header import read_gguf_header
from evopress.util.errors import ModelError, brief
from evopress.util.progress import log

# Pre-tokenizers by the name that a GGUF file gives them (`tokenizer.ggml.pre`).

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SYMBOLS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_THREE_DIGITS = "[0-9][0-9][0-9]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SYMBOLS_OR_SLASH}|{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SYMBOLS_OR_SLASH}|{_SPACES}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_HAN = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_LLM = (r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN)  # noqa: RUF001
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)


def _bytes(*, words: bool = False) -> PreTokenizer:
    """Spell bytes as letters; with ``words``, cut as GPT-2 does beforehand."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)


def _splits(*patterns: str) -> PreTokenizer:
    """Cut out what matches each pattern in turn."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, _bytes()])


def _single_digits_first() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(words=True)])


def _falcon() -> PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=False)
    three = pre_tokenizers.Split(Regex(_THREE_DIGITS), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), _bytes(words=True), digits, three])


def _deepseek(patterns: tuple[str, ...]) -> PreTokenizer:
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.Digits(individual_digits=True), _bytes()])


@dataclass(frozen=True)
class Pretokenizer:
    """What one name stands for."""

    make: Callable[[], PreTokenizer]
    whole_words: bool = False
    """Whether a word that is a token is taken as it is, however its merges would go."""
    adds_bos: bool = False
    """Whether texts begin with the start token where the file does not say."""
    composed: bool = False
    """Whether characters are composed first (NFC)."""

    def normalizer(self) -> Normalizer | None:
        """What is done to the text before it is cut."""
        return normalizers.NFC() if self.composed else None


def _named(names: str, kind: Pretokenizer) -> dict[str, Pretokenizer]:
    return dict.fromkeys(names.split(), kind)


DEFAULT = Pretokenizer(lambda: _splits(*_DEFAULT))
"""What llama.cpp takes where a file gives no name."""
PRETOKENIZERS = {
    "default": DEFAULT,
    **_named("gpt-2 phi-2 mpt jais trillion granite-docling exaone4", Pretokenizer(lambda: _bytes(words=True))),
    **_named("gigachat mellum a.x-4.0 modern-bert", Pretokenizer(lambda: _bytes(words=True))),
    **_named("olmo", Pretokenizer(lambda: _bytes(words=True), composed=True)),
    **_named("smollm starcoder refact codeshell exaone minerva-7b mellum2", Pretokenizer(_single_digits_first)),
    **_named("command-r", Pretokenizer(_single_digits_first, composed=True)),
    **_named(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        Pretokenizer(lambda: _splits(_LLAMA3), whole_words=True, adds_bos=True),
    ),
    **_named("dbrx smaug-bpe glm4 chatglm-bpe", Pretokenizer(lambda: _splits(_LLAMA3))),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez", Pretokenizer(lambda: _splits(_QWEN2), composed=True)),
    **_named("stablelm2 hunyuan solar-open grok-2", Pretokenizer(lambda: _splits(_QWEN2))),
    **_named("qwen35", Pretokenizer(lambda: _splits(_QWEN35), composed=True)),
    **_named("seed-coder", Pretokenizer(lambda: _splits(_SEED_CODER))),
    **_named("bailingmoe bailingmoe2 llada-moe", Pretokenizer(lambda: _splits(_BAILING))),
    **_named("tekken", Pretokenizer(lambda: _splits(_TEKKEN), whole_words=True, adds_bos=True)),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", Pretokenizer(lambda: _splits(_GPT4O))),
    **_named("falcon", Pretokenizer(_falcon)),
    **_named("bloom poro-chat gpt3-finnish", Pretokenizer(lambda: _splits(_BLOOM))),
    **_named("viking", Pretokenizer(lambda: _splits(_BLOOM, r"\p{N}"))),
    **_named("deepseek-llm", Pretokenizer(lambda: _deepseek(_DEEPSEEK_LLM))),
    **_named("deepseek-coder", Pretokenizer(lambda: _deepseek(_DEEPSEEK_CODER))),
    **_named("deepseek-v3 hunyuan-dense joyai-llm", Pretokenizer(lambda: _splits(*_DEEPSEEK_V3))),
}


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
