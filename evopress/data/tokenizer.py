"""The model's own tokenizer, used as it is: special tokens are added where it adds them, and nowhere else."""

import json
import re
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from evopress.util.errors import DataError, ModelError
from evopress.util.progress import log

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
