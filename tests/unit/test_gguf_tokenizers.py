"""The tokenizer of a GGUF file cuts text as the name of its pre-tokenizer says, and keeps what the header says."""

from pathlib import Path
from typing import Any

import gguf_files
import pytest
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from evopress.models.gguf_tokenizer import PRETOKENIZERS, save_tokenizer
from evopress.util.errors import ModelError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = "It's x2345  don'T\n\n12 HelloWorld"


def pieces(name: str, text: str) -> list[str]:
    """What ``text`` is cut into, with spaces and line breaks as they were."""
    cut = PRETOKENIZERS[name].make().pre_tokenize_str(text)
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("gpt-2 phi-2 mpt olmo", ["It", "'s", " x", "2345", " ", " don", "'", "T", "\n", "\n", "12", " HelloWorld"]),
        (
            "smollm starcoder refact command-r",
            ["It", "'s", " x", "2", "3", "4", "5", " ", " don", "'", "T", "\n\n", "1", "2", " HelloWorld"],
        ),
        (
            "llama-bpe llama3 dbrx smaug-bpe glm4",
            ["It", "'s", " x", "234", "5", " ", " don", "'T", "\n\n", "12", " HelloWorld"],
        ),
        (
            "qwen2 stablelm2 deepseek-r1-qwen qwen35",
            ["It", "'s", " x", "2", "3", "4", "5", " ", " don", "'T", "\n\n", "1", "2", " HelloWorld"],
        ),
        (
            "tekken",
            ["It", "'s", " x", "2", "3", "4", "5", " ", " don", "'T", "\n\n", "1", "2", " Hello", "World"],
        ),
        ("gpt-4o llama4", ["It's", " x", "234", "5", " ", " don'T", "\n\n", "12", " Hello", "World"]),
        ("falcon", ["It", "'", "s", " x", "234", "5", " ", " don", "'", "T", "\n", "\n", "12", " HelloWorld"]),
        ("default", ["It", "'", "s", " x", "234", "5", " ", " don", "'", "T", "\n", "\n", "12", " HelloWorld"]),
        (
            "deepseek-llm deepseek-coder",
            ["It", "'", "s", " x", "2", "3", "4", "5", " ", " don", "'", "T", "\n", "\n", "1", "2", " HelloWorld"],
        ),
        ("deepseek-v3", ["It", "'s", " x", "234", "5", " ", " don", "'T", "\n\n", "12", " HelloWorld"]),
        ("bloom", ["It's", " x2345", " ", " don'T", "\n\n", "12", " HelloWorld"]),
    ],
)
def test_text_is_cut_as_the_name_says(names: str, expected: list[str]) -> None:
    for name in names.split():
        assert pieces(name, TEXT) == expected, name


def test_every_name_keeps_every_byte() -> None:
    text = TEXT + " Ünï 你好，世界 ١٢ ...\t\r\n"  # noqa: RUF001
    spelled = "".join(piece for piece, _ in PRETOKENIZERS["gpt-2"].make().pre_tokenize_str(text))
    for name, kind in PRETOKENIZERS.items():
        assert "".join(piece for piece, _ in kind.make().pre_tokenize_str(text)) == spelled, name


def saved(
    tmp_path: Path, keys: dict[str, Any], metadata: dict[str, str] | None = None, architecture: str = "llama"
) -> transformers.PreTrainedTokenizerBase:
    """What AutoTokenizer makes of the folder of a file with these keys."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = transformers.Phi3Config if architecture == "phi3" else transformers.LlamaConfig
    config = kind(**sizes, vocab_size=8, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    gguf_files.write(tmp_path / "tiny.gguf", model, architecture, {}, tokenizer=keys, metadata=metadata)
    folder = tmp_path / "made"
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    save_tokenizer(tmp_path / "tiny.gguf", folder, len(keys["tokens"]))
    return AutoTokenizer.from_pretrained(folder)


def bpe(words: list[str], merges: list[str], **keys: Any) -> dict[str, Any]:
    """Byte-level BPE: 256 letters, then ``words``; `<s>` and `</s>` come last."""
    tokens = [*LETTERS, *words, "<s>", "</s>"]
    kinds = [*[1] * (len(tokens) - 2), 3, 3]
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    return {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": merges, **ends, **keys}


def words_of(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_the_reloaded_tokenizer_cuts_as_the_file_says(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, bpe(["ĊĊ", "12"], ["Ċ Ċ", "1 2"], pre="smollm"))
    assert words_of(tokenizer, "\n\n12") == ["ĊĊ", "1", "2"]
    assert tokenizer.decode(tokenizer("\n\n12 ü 你")["input_ids"]) == "\n\n12 ü 你"
    tokenizer = saved(tmp_path, bpe(["ĊĊ", "12"], ["Ċ Ċ", "1 2"], pre="gpt-2"))
    assert words_of(tokenizer, "\n\n12") == ["Ċ", "Ċ", "12"]


def test_words_that_are_tokens_stay_whole_where_the_name_says_so(tmp_path: Path) -> None:
    words = ["ab", "bc", "abc"]
    llama = saved(tmp_path, bpe(words, ["b c", "a b"], pre="llama-bpe", add_bos_token=False))
    assert words_of(llama, "abc") == ["abc"]
    qwen = saved(tmp_path, bpe(words, ["b c", "a b"], pre="qwen2"))
    assert words_of(qwen, "abc") == ["a", "bc"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"pre": "gpt-2"}, ["a"]),
        ({"pre": "llama-bpe"}, ["<s>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
        ({"pre": "gpt-2", "add_bos_token": True}, ["<s>", "a"]),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
        ({"pre": "qwen2", "add_eos_token": True}, ["a", "</s>"]),
    ],
)
def test_start_and_end_tokens_are_added_as_the_file_says(
    keys: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    tokenizer = saved(tmp_path, bpe([], [], **keys))
    assert words_of(tokenizer, "a") == expected
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_tokens_of_special_kinds_stay_whole(tmp_path: Path) -> None:
    keys = bpe(["<｜User｜>", "<think>"], [], pre="deepseek-v3")  # noqa: RUF001
    keys["token_type"][256:258] = [3, 4]
    tokenizer = saved(tmp_path, keys)
    assert words_of(tokenizer, "<｜User｜>a<think>") == ["<｜User｜>", "a", "<think>"]  # noqa: RUF001
    assert tokenizer.decode(tokenizer("<｜User｜>a<think>")["input_ids"], skip_special_tokens=True) == "a<think>"  # noqa: RUF001
    assert len(tokenizer) == len(keys["tokens"])


def test_chat_templates_are_kept_by_name(tmp_path: Path) -> None:
    named = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = saved(tmp_path, bpe([], [], pre="gpt-2"), named)
    assert tokenizer.chat_template == {"default": "plain", "tool_use": "tools"}
    with pytest.raises(ModelError, match="its name cannot be that of a file"):
        saved(tmp_path, bpe([], [], pre="gpt-2"), {"tokenizer.chat_template.../../x": "evil"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre": "of-the-future"}, r"tokenizer\.ggml\.pre is 'of-the-future'.*safetensors.*--pre-tokenizer NAME"),
        ({"pre": "gpt-2", "model": "t5"}, r"tokenizer\.ggml\.model is 't5'"),
        ({"pre": "gpt-2", "normalizer.lowercase": True}, r"tokenizer\.ggml\.normalizer\.lowercase is True"),
        ({"pre": "gpt-2", "add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token is True"),
        ({"pre": "gpt-2", "eot_token_id": 999}, r"tokenizer\.ggml\.eot_token_id is 999, and there are 258 tokens"),
        ({"pre": "gpt-2", "bos_token_id": None, "add_bos_token": True}, r"bos_token_id is missing"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        saved(tmp_path, bpe([], [], **keys))


def sentencepiece(**keys: Any) -> dict[str, Any]:
    """A vocabulary as SentencePiece makes it, whose pre-tokenizer has no say."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -3.0, -2.0]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "pre": "any", "tokens": tokens, "token_type": kinds, "scores": scores, **ids, **keys}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ["<s>", "▁ab", "▁a"]),
        ({"add_space_prefix": True}, ["<s>", "▁ab", "▁a"]),
        ({"add_space_prefix": False}, ["<s>", "ab", "▁a"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["▁ab", "▁a", "</s>"]),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_sentencepiece(architecture: str, keys: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, sentencepiece(**keys), architecture=architecture)
    assert words_of(tokenizer, "ab a") == expected
    assert tokenizer.decode(tokenizer("ab a ü")["input_ids"], skip_special_tokens=True).strip() == "ab a ü"
