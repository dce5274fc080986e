"""The tokenizer of a GGUF file: the reverse of `evopress/models/gguf_tokenizer.py`, which reads it back as a check.

A file holds tokens, their kinds, and merges or scores, but of how text is cut only a name that llama.cpp has code for.
The name is found by what it does: the pre-tokenizer that cuts texts of all sorts like the model's own.
"""

import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import normalizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evopress.models.gguf_tokenizer import PRETOKENIZERS, save_tokenizer
from evopress.util.errors import ModelError, brief
from evopress.util.progress import log

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "▁"
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_UNUSED_SCORE = -1e6
"""Of tokens that no merge makes: lower than that of any merge."""
_CHARACTERS = [
    *"aZsßéЖжΩ\u0627\u0647中カ한กʰǅ",
    *"059٣½",
    *" \n\r\t\u00a0\u3000",
    *"''.,!?:;-_/\\$+=<>^~|#@*&%()[]{}\"`",
    *"\u2014…।。¿€©",
    *("😀", "👩\u200d💻", "\u0301", "\u200b"),
]
_WORDS = [
    "'s",
    "'LL",
    "'d",
    "Don't",
    "hello",
    "WORLD",
    "CamelCase",
    "12345",
    "3.14",
    "    ",
    "\n\n",
    "\r\n",
    " \n ",
    "naïve",
]
_TEXTS, _PIECES = 5000, 12
"""Random texts by which pre-tokenizers are told apart, and characters or words in each."""
_MOST = 3000
"""Tokens whose own text is part of the check."""


def tokenizer_keys(folder: Path, rows: int) -> dict[str, Any]:
    """Keys of the header that describe the tokenizer of a model folder, chat template included.

    Args:
        folder: of the model.
        rows: tokens that the model has an embedding for; those without a text are marked as unused.

    Raises:
        ModelError: the tokenizer is of a kind that GGUF cannot hold, or cuts text like none that llama.cpp knows.
    """
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = _tokens(tokenizer, rows, folder)
    if content["model"]["type"] != "BPE":
        raise _refusal(folder, f"its model is {content['model']['type']}, and only BPE can be carried over")
    if content["model"].get("byte_fallback"):
        found = _sentencepiece(tokenizer, content, tokens)
    else:
        found = _byte_level(tokenizer, content, tokens, folder)
    found |= {
        f"{name}_token_id": id
        for special, name in _IDS.items()
        if (id := getattr(tokenizer, f"{special}_token_id")) is not None
    }
    found |= _ends(tokenizer, folder)
    keys = {f"{_PREFIX}{key}": value for key, value in found.items()}
    return keys | _chat_templates(tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, with its definition in full.

    Raises:
        ModelError: it cannot be read, or is none that the tokenizers library runs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({brief(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(folder, f"{type(tokenizer).__name__} runs in Python, so its rules cannot be told")
    return tokenizer


def check_tokens(path: Path, folder: Path, rows: int) -> None:
    """Read the tokenizer of a GGUF file back, and compare its tokens with those of the model folder it was made from.

    Where a text begins with a space, or goes on after a special token, llama.cpp puts the space of SentencePiece before
    it in any case; models that do not are used with it all the same, so that is only said in the log.

    Raises:
        ModelError: they differ; the message shows where.
    """
    original = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as made:
        save_tokenizer(path, Path(made), rows)
        read = load_tokenizer(Path(made))
    spaced = _cut_as_llama_cpp(read)
    for text, is_plain in _texts_of(original):
        if original(text)["input_ids"] != read(text)["input_ids"]:
            if is_plain or not spaced:
                raise _refusal(folder, f"what can be carried over cuts {text[:60]!r} into other tokens")
            log.warning("%s: llama.cpp cuts %r into other tokens: it puts a space before it", path.name, text[:60])
            break


def _cut_as_llama_cpp(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Put the space before every text and every part after a special token; returns whether it is of that kind."""
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    first = tokenizer.tokenize("a")[:1]
    if not model.get("byte_fallback") or not first or not first[0].startswith(_SPACE):
        return False
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.pre_tokenizer = None
    return True


def _tokens(tokenizer: PreTrainedTokenizerFast, rows: int, folder: Path) -> list[str]:
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise _refusal(folder, f"{by_id[max(by_id)]!r} is number {max(by_id)}, and the model embeds {rows} tokens")
    return [by_id.get(id, f"[PAD{id}]") for id in range(rows)]


def _byte_level(
    tokenizer: PreTrainedTokenizerFast, content: Mapping[str, Any], tokens: list[str], folder: Path
) -> dict[str, Any]:
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    if any(" " in part for merge in merges for part in merge):
        raise _refusal(folder, "parts of its merges contain spaces")
    return {
        "model": "gpt2",
        "pre": _pretokenizer_name(tokenizer, content, folder),
        "tokens": tokens,
        "token_type": _kinds(tokenizer, tokens, ()),
        "merges": [" ".join(merge) for merge in merges],
    }


def _pretokenizer_name(tokenizer: PreTrainedTokenizerFast, content: Mapping[str, Any], folder: Path) -> str:
    """First name of those that cut text as the tokenizer does, and treat whole words alike."""
    normalizer = content["normalizer"]
    composed = normalizer is not None and normalizer["type"] == "NFC"
    if normalizer is not None and not composed:
        raise _refusal(folder, f"it normalizes text ({normalizer['type']}), and llama.cpp does not")
    whole_words = bool(content["model"].get("ignore_merges"))
    cut, texts = tokenizer.backend_tokenizer.pre_tokenizer, _random_texts()
    alike: dict[int, bool] = {}
    for name, known in PRETOKENIZERS.items():
        if (known.composed, known.whole_words) != (composed, whole_words):
            continue
        if id(known) not in alike:
            alike[id(known)] = cut is not None and _same_cuts(cut, known.make(), texts)
        if alike[id(known)]:
            return name
    raise _refusal(folder, "its pre-tokenizer cuts text like none that llama.cpp has a name for")


def _same_cuts(one: PreTokenizer, other: PreTokenizer, texts: Iterable[str]) -> bool:
    return all(one.pre_tokenize_str(text) == other.pre_tokenize_str(text) for text in texts)


def _random_texts() -> list[str]:
    """Texts in which letters, digits, signs and spaces of many kinds meet in every order."""
    choice, pieces = random.Random(0), [*_CHARACTERS, *_WORDS]  # noqa: S311 (no secret)
    return ["".join(choice.choices(pieces, k=_PIECES)) for _ in range(_TEXTS)]


def _sentencepiece(tokenizer: PreTrainedTokenizerFast, content: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Scores stand for the order of merges: llama.cpp joins the two neighbours whose union has the highest."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    bytes_ = {f"<0x{value:02X}>" for value in range(256)}
    first = tokenizer.tokenize("a")[:1]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": _kinds(tokenizer, tokens, bytes_),
        "scores": [scores.get(token, _UNUSED_SCORE) for token in tokens],
        "add_space_prefix": first[0].startswith(_SPACE) if first else False,
    }


def _kinds(tokenizer: PreTrainedTokenizerFast, tokens: list[str], bytes_: Iterable[str]) -> list[int]:
    kinds = dict.fromkeys(bytes_, gguf.TokenType.BYTE)
    added = tokenizer.added_tokens_decoder.values()
    kinds |= {
        token.content: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED for token in added
    }
    if tokenizer.unk_token is not None and bytes_:
        kinds[tokenizer.unk_token] = gguf.TokenType.UNKNOWN
    if greedy := sorted(token.content for token in added if token.lstrip or token.rstrip or token.single_word):
        log.warning("%s: takes spaces beside it along, which GGUF has no key for; llama.cpp may keep them", greedy[0])
    vocabulary = tokenizer.get_vocab()
    return [
        int(kinds.get(token, gguf.TokenType.NORMAL if token in vocabulary else gguf.TokenType.UNUSED))
        for token in tokens
    ]


def _ends(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, bool]:
    """Whether texts get a start and an end token."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            start = [tokenizer.bos_token_id] if bos else []
            if whole == [*start, *bare, *([tokenizer.eos_token_id] if eos else [])]:
                return {"add_bos_token": bos, "add_eos_token": eos}
    raise _refusal(folder, "it puts other tokens around a text than a start and an end token")


def _chat_templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    templates = tokenizer.chat_template
    if not templates:
        return {}
    if isinstance(templates, str):
        return {_TEMPLATE: templates}
    return {_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}": text for name, text in templates.items()}


def _texts_of(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, bool]]:
    """Texts that must be cut alike, and whether each begins with no space and has no special token in it."""
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.get_added_vocab())
    step = max(1, len(vocabulary) // _MOST)
    own = [id for token, id in sorted(vocabulary.items()) if token not in special]
    words = [str(tokenizer.decode([id])) for id in own[::step]]
    for text in (*_random_texts()[::10], "a" + " ".join(words), "a" + "".join(words)):
        yield text.lstrip(), True
    for text in (" a", "  \n a", *(f"a{token}b" for token in sorted(special)[:_MOST] if _SPACE not in token)):
        yield text, False


def _refusal(folder: Path, reason: str) -> ModelError:
    return ModelError(f"{folder}: its tokenizer cannot be written as GGUF: {reason}")
