"""Pre-tokenizers by the name that a GGUF file gives them (`tokenizer.ggml.pre`).

They say where text is cut before byte-level BPE merges what lies between. A file holds the name alone; what it stands
for is what the models that bear it were trained with.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

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
