"""Documents as tokens, with a start token where the model was trained to see one.

Some models are lost without the start token that stood before every text in training: Gemma's perplexity rises to the
hundreds. A text that is cut into windows has it in the first window alone, so by default every window of a model whose
tokenizer adds it begins with it. Nothing before a start token predicts it; `evopress.data.tokens.read_counted` says
which positions count.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from evopress.config.data import StartToken
from evopress.data.documents import AnyDocument, Conversation, Passage
from evopress.util.errors import DataError, ModelError
from evopress.util.progress import log

# The model's own tokenizer, used as it is: special tokens are added where it adds them, and nowhere else.

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_NO_LIMIT = int(1e30)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{folder}: holds no tokenizer that can be read: {error}") from error
    tokenizer.model_max_length = _NO_LIMIT  # whole texts are encoded, and windows cut later: no warning is due
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> np.ndarray:
    """Tokens of one text, int32 [tokens], with the special tokens that the tokenizer itself adds (if ``special``).

    JSON can hold half a surrogate pair, which is no character: it is replaced, as in decoding with errors.
    """
    text = _HALF_PAIR.sub("\ufffd", text)
    encoded = tokenizer(text, return_attention_mask=False, add_special_tokens=special)
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that parts documents, or None where the tokenizer marks the start (or end) of each text by itself."""
    return None if tokenizer("")["input_ids"] else end_of_text(tokenizer)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that ended a document in training, if the vocabulary has one.

    Chat models often call their end of turn ``eos_token``, which never parted documents, so ``<|endoftext|>`` comes
    first where the vocabulary has it as a special token.
    """
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content == "<|endoftext|>":
            return int(id)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def check_vocabulary(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        ModelError: it has not: the tokenizer belongs to another model; or config.json cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json: cannot be read: {error}") from error
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if size is not None and len(tokens) and (worst := int(tokens.max())) >= size:
        raise ModelError(
            f"{folder}: the tokenizer gives token {worst} ({tokenizer.convert_ids_to_tokens(worst)!r}), but the "
            f"model's vocabulary ends at {size - 1}; use the tokenizer that belongs to this model"
        )


def check_positions(length: int, folder: Path, where: str, *, trust_remote_code: bool = False) -> None:
    """Check that a model that learned an embedding for each position has one for every token of a sequence.

    Models with rotary positions or attention biases run on longer sequences than they were made for, but not well: the
    log gets a warning.

    Raises:
        DataError: sequences are too long for it; ``where`` is the setting that the message names.
        ModelError: config.json cannot be read.
    """
    try:  # transformers fills in what old configs leave out
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{folder}/config.json: cannot be read: {error}") from error
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or length <= longest:
        return
    too_long = f"{where}.sequence_length: {length} tokens are more than the {longest} positions that the model knows"
    if not any(word in key for key in text.to_dict() for word in ("rope", "rotary", "alibi")):
        raise DataError(f"{too_long}; set it to {longest} or less")
    log.warning("%s: what it does beyond them is no measure of it; set it to %d or less", too_long, longest)


# Sequences of one length out of documents of any length: packed, not padded; split, not cut.


class Encoded(NamedTuple):
    """A document as tokens: int32 [tokens]."""

    name: str
    tokens: np.ndarray


class Window(NamedTuple):
    """A sequence: int32 [length], and the names of the documents in it, in order."""

    documents: tuple[str, ...]
    tokens: np.ndarray


def pack(
    documents: Iterable[Encoded], length: int, separator: int | None = None, start: int | None = None
) -> Iterator[Window]:
    """Cut the stream of all documents into windows of ``length`` tokens, reading no further than needed.

    Args:
        documents: in order; empty ones leave no trace.
        length: tokens of a window.
        separator: token put between two documents (it counts to the first of them), or None for none.
        start: token put before a window that does not begin with it by itself, or None for none.
    """
    parts: list[Encoded] = []  # what the window under construction holds
    held = 0
    last: str | None = None
    for name, tokens in documents:
        if not len(tokens):
            continue
        pieces = [Encoded(name, tokens)]
        if last is not None and separator is not None:
            pieces.insert(0, _single(last, separator))
        last = name
        for piece in pieces:
            rest = piece.tokens
            while len(rest):
                if not held and start is not None and rest[0] != start:
                    parts, held = [_single(piece.name, start)], 1
                taken, rest = rest[: length - held], rest[length - held :]
                parts.append(Encoded(piece.name, taken))
                held += len(taken)
                if held == length:
                    yield _window(parts)
                    parts, held = [], 0


def _single(name: str, token: int) -> Encoded:
    return Encoded(name, np.array([token], dtype=np.int32))


def _window(parts: list[Encoded]) -> Window:
    """Join the parts; a document in several neighbouring parts is named once."""
    names = dict.fromkeys(part.name for part in parts)
    return Window(tuple(names), np.concatenate([part.tokens for part in parts]).astype(np.int32))


def choose(windows: Iterable[Window], count: int | None, rng: np.random.Generator | None) -> list[Window]:
    """Take ``count`` windows (all, if None): the first ones without ``rng``, else a random choice in random order."""
    if rng is None:
        return list(islice(windows, count))
    pool = list(windows)
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


NEED_START = ("gemma",)
"""Beginnings of the model types that need a start token in every window, even where their tokenizer adds none."""


@dataclass(frozen=True)
class Encoder:
    """How documents of a model become tokens."""

    tokenizer: PreTrainedTokenizerBase
    start: int | None
    """Token that begins every document; None for none."""
    every_window: bool
    """Whether windows that begin inside a document begin with it too."""
    separator: int | None
    """Token between two documents, where nothing else marks their start or end."""
    special: bool
    """Whether the tokenizer adds the special tokens that it would add by itself."""

    def encode(self, documents: Iterable[AnyDocument], length: int) -> Iterator[Encoded]:
        """Tokens of each document; of a passage at most ``length``, the tokens of a window.

        Raises:
            DataError: a conversation cannot be put into words.
        """
        for document in documents:
            text = self._words(document)
            if text.strip():  # an empty document would leave nothing but a special token
                tokens = encode(self.tokenizer, text, special=self.special)
                if self.start is not None and (not len(tokens) or tokens[0] != self.start):
                    tokens = np.concatenate([np.array([self.start], dtype=np.int32), tokens])
                yield Encoded(document.name, tokens[:length] if isinstance(document, Passage) else tokens)

    def _words(self, document: AnyDocument) -> str:
        if not isinstance(document, Conversation):
            return document.text
        if not document.messages:
            return ""
        text = render(self.tokenizer, document.messages, document.name)
        # Most templates begin with the start token, which is added (or not) as to any document.
        return text.removeprefix(str(self.tokenizer.bos_token)) if self.tokenizer.bos_token else text


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, bos: StartToken | None, where: str, model_type: str = ""
) -> Encoder:
    """Encoder of a model.

    Args:
        tokenizer: of the model.
        bos: which start tokens there are; None is what the model needs.
        where: the text's settings, for messages.
        model_type: of the model's config.

    Raises:
        DataError: a start token is asked for, and the tokenizer has none.
    """
    own = _own_start(tokenizer)
    start = tokenizer.bos_token_id if own is None else own
    if bos is None:
        bos = "window" if own is not None or (start is not None and model_type.startswith(NEED_START)) else "none"
    if bos == "none":
        special = own is None
        separator = document_separator(tokenizer) if special else end_of_text(tokenizer)
        return Encoder(tokenizer, None, every_window=False, separator=separator, special=special)
    if start is None:
        raise DataError(f"{where}.bos: {bos!r} asks for a start token, but the tokenizer has none; set it to none")
    return Encoder(tokenizer, int(start), every_window=bos == "window", separator=None, special=True)


def _own_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that the tokenizer itself puts before each text, if it does."""
    alone = tokenizer("")["input_ids"]
    return int(alone[0]) if alone and tokenizer("a")["input_ids"][0] == alone[0] else None


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str) -> str:
    """A conversation in the words of the model's chat template.

    Raises:
        DataError: there is no template, or it does not take these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: `messages: true` needs a chat template, and the model's tokenizer has none; write the "
            "conversations out as text, one row each"
        )
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where}: the model's chat template does not take these messages ({error})") from error
