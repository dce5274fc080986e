"""Documents as tokens, with a start token where the model was trained to see one.

Some models are lost without the start token that stood before every text in training: Gemma's perplexity rises to the
hundreds. A text that is cut into windows has it in the first window alone, so by default every window of a model whose
tokenizer adds it begins with it. Nothing before a start token predicts it; `evopress.data.tokens.read_counted` says
which positions count.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from evopress.config.data import StartToken
from evopress.data.documents import AnyDocument, Conversation, Passage
from evopress.data.tokenizer import document_separator, encode, end_of_text
from evopress.data.windows import Encoded
from evopress.util.errors import DataError

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
