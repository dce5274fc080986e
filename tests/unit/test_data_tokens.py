"""From settings to tokens/*.parquet, with a tokenizer of bytes so that every token can be read."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import TOKENS, read_provenance, read_table
from evopress.config.data import FileText, HubText, PythonDocs
from evopress.data import tokens as tokens_module
from evopress.data.documents import Corpus, Document
from evopress.data.encoder import document_separator, load_tokenizer, make_encoder
from evopress.data.sources import open_corpus
from evopress.data.tokens import read_counted, read_tokens, write_tokens
from evopress.util import progress
from evopress.util.errors import ArtifactError, DataError, ModelError

BOS, EOS, END_OF_TEXT = 256, 257, 258


def byte_tokenizer(*, bos: bool = False, end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte, <s> = 256, <|im_end|> = 257 and perhaps <|endoftext|> = 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_end|>", *(["<|endoftext|>"] if end_of_text else [])]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")


def make_windows(corpus, tokenizer, settings, where):
    return tokens_module.make_windows(corpus, make_encoder(tokenizer, settings.bos, where), settings, where)


def make_results(root, tokenizer=None, vocab_size=300):
    run = Run(root)
    (tokenizer or byte_tokenizer()).save_pretrained(run.model)
    (run.model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
    run.model_manifest.write_text(json.dumps({"fingerprint": "abc"}))
    return run


@pytest.fixture
def run(tmp_path):
    return make_results(tmp_path / "results")


@pytest.fixture
def folder(tmp_path):
    """Twelve documents, 40 bytes each."""
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(12):
        (path / f"{i:02d}.txt").write_text(f"{i:02d}" * 20)
    return str(path)


def test_windows_hold_the_text_and_name_its_documents(run, folder):
    write_tokens("wiki", "evaluation", FileText(path=folder, sequence_length=64), run)
    table = read_table(run.tokens("wiki"), TOKENS)
    stream = np.concatenate(table["tokens"].to_list())
    expected = "<|endoftext|>".join(f"{i:02d}" * 20 for i in range(12))
    decoded = load_tokenizer(run.model).decode(stream)
    assert len(stream) == (12 * 40 + 11) // 64 * 64
    assert expected.startswith(decoded)
    assert table["sequence"].to_list() == list(range(7))
    assert [list(names) for names in table["documents"]][:2] == [["00.txt", "01.txt"], ["01.txt", "02.txt", "03.txt"]]
    provenance = read_provenance(run.tokens("wiki"))
    assert provenance.model == "abc" and json.loads(provenance.settings)["path"] == folder
    tensor = read_tokens(run, "wiki")
    assert tensor.shape == (7, 64) and str(tensor.dtype) == "torch.int64"
    assert tensor.flatten().tolist() == stream.tolist()


def test_same_seed_same_bytes_other_seed_other_windows(run, folder):
    def written(seed):
        write_tokens("search", "search", FileText(path=folder, sequence_length=16, tokens=64, seed=seed), run)
        return run.tokens("search").read_bytes(), read_tokens(run, "search").tolist()

    first, again, other = written(0), written(0), written(1)
    assert first == again
    assert first[1] != other[1]


def test_evaluation_takes_the_first_windows_whatever_the_seed(run, folder):
    def windows(name, **wanted):
        write_tokens(name, "evaluation", FileText(path=folder, sequence_length=16, **wanted), run)
        return read_tokens(run, name).tolist()

    whole = windows("whole")
    assert windows("part", tokens=64, seed=5) == whole[:4]


def test_chosen_windows_come_from_all_over_the_text(run, folder):
    write_tokens("search", "search", FileText(path=folder, sequence_length=40, tokens=320), run)
    names = {name for row in read_table(run.tokens("search"), TOKENS)["documents"] for name in row}
    assert len(names) > 8


def test_a_stream_is_read_no_further_than_its_buffer_and_its_tokens(monkeypatch):
    monkeypatch.setattr(tokens_module, "BUFFER", 20)
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield Document(f"x:{read[-1]}", f"{read[-1]:039d}")

    wanted = HubText(id="x", tokens=800, sequence_length=80, seed=3)
    windows = make_windows(Corpus("x", endless(), order="stream"), byte_tokenizer(), wanted, "data.search")
    assert len(windows) == 10 and len(read) <= 20 + 800 // 40 + 1
    used = [name for window in windows for name in window.documents]
    assert used != sorted(used)


def test_a_field_convention_limits_the_windows_unless_tokens_says_more():
    corpus = Corpus("c4", [Document("c4/validation", "x" * 1000)], order="text", usual_windows=5)
    for tokens, expected in ((None, 5), (800, 10)):
        wanted = HubText(id="x", tokens=tokens, sequence_length=80)
        assert len(make_windows(corpus, byte_tokenizer(), wanted, "data.evaluation.c4")) == expected


def test_special_tokens_are_those_of_the_tokenizer():
    assert document_separator(byte_tokenizer(bos=True)) is None  # <s> opens each document
    assert document_separator(byte_tokenizer()) == END_OF_TEXT  # <|im_end|> ends a turn, not a document
    assert document_separator(byte_tokenizer(end_of_text=False)) == EOS
    corpus = Corpus("x", [Document("a", "AAAA"), Document("empty", " \n"), Document("b", "BBBB")], order="text")
    wanted = HubText(id="x", sequence_length=9)
    (window,) = make_windows(corpus, byte_tokenizer(), wanted, "data.search")
    assert byte_tokenizer().decode(window.tokens) == "AAAA<|endoftext|>BBBB" and window.documents == ("a", "b")
    (window,) = make_windows(corpus, byte_tokenizer(bos=True), wanted, "data.search")
    assert byte_tokenizer().decode(window.tokens) == "<s>AAAA<s>BBB"


def cut(bos, tokenizer, *texts, length=4):
    """Windows as text."""
    corpus = Corpus("x", [Document(text, text) for text in texts], order="text")
    wanted = HubText(id="x", sequence_length=length, bos=bos)
    return [byte_tokenizer().decode(w.tokens) for w in make_windows(corpus, tokenizer, wanted, "data.search")]


def test_start_tokens_stand_where_the_settings_say_or_the_tokenizer_adds_them():
    adds, plain = byte_tokenizer(bos=True), byte_tokenizer()
    assert cut("document", adds, "abcdefgh", "ij") == ["<s>abc", "defg", "h<s>ij"]
    assert cut("window", adds, "abcdefgh", "ij") == ["<s>abc", "<s>def", "<s>gh<s>"]
    assert cut("none", adds, "abcdefgh", "ij") == ["abcd", "efgh"]
    assert cut("none", adds, "abc", "def") == ["abc<|endoftext|>"]
    assert cut("document", plain, "abcdefgh", "ij") == ["<s>abc", "defg", "h<s>ij"]
    assert cut("window", plain, "abc", "def") == ["<s>abc", "<s>def"]
    assert cut(None, adds, "abcdefgh", "ij") == cut("window", adds, "abcdefgh", "ij")
    assert cut(None, plain, "abc", "def") == cut("none", plain, "abc", "def")


def test_a_family_that_needs_start_tokens_gets_them_even_where_its_tokenizer_adds_none(tmp_path, folder):
    wanted = FileText(path=folder, sequence_length=16, tokens=160)
    for kind, expected in (("gemma2", {BOS}), ("llama", set())):
        run = make_results(tmp_path / kind)
        (run.model / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 300}))
        write_tokens("search", "search", wanted, run)
        firsts = set(read_tokens(run, "search")[:, 0].tolist())
        assert firsts == expected if expected else BOS not in firsts


def test_a_start_token_that_does_not_exist_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"data\.search\.bos: 'window' asks for a start token, .* set it to none"):
        cut("window", tokenizer, "abcdefgh")


def test_positions_before_a_start_token_do_not_count(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n{"text": "d"}\n{"text": "efghij"}\n')
    run = make_results(tmp_path / "results", byte_tokenizer(bos=True))
    for bos, text, uncounted in (
        ("document", "<s>abc<s>d<s>", [3, 5]),
        ("none", "abc<|endoftext|>d<|endoftext|>e", []),
    ):
        wanted = FileText(path=str(tmp_path / "rows.jsonl"), sequence_length=7, bos=bos)
        write_tokens("mine", "evaluation", wanted, run)
        tokens, counted = read_tokens(run, "mine"), read_counted(run, "mine")
        assert counted.shape == tokens.shape and byte_tokenizer().decode(tokens[0]) == text
        assert [position for position in range(7) if not counted[0, position]] == uncounted


CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_conversations_go_through_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": messages}) + '\n{"messages": null}\n{"messages": []}\n'
    )
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = CHAT
    wanted = FileText(path=str(tmp_path / "chat.jsonl"), messages=True, sequence_length=22)

    def windows(settings):
        return make_windows(open_corpus(settings, "search"), tokenizer, settings, "data.search")

    (window,) = windows(wanted)
    assert byte_tokenizer().decode(window.tokens) == "<s>[user]Hi[assistant]Yo"
    (window,) = windows(wanted.model_copy(update={"bos": "none", "sequence_length": 21}))
    assert byte_tokenizer().decode(window.tokens) == "[user]Hi[assistant]Yo"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*chat template does not take .*roles must alternate"):
        windows(wanted)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"needs a chat template, and the model's tokenizer has none; write"):
        windows(wanted)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([64, 512]), st.integers(1, 20))
def test_embedded_roles_share_no_topic_for_any_seed_and_size(seed, length, count):
    tokenizer, seen = byte_tokenizer(), {}
    for role in ("calibration", "search", "evaluation"):
        wanted = PythonDocs(seed=seed, sequence_length=length, tokens=count * length)
        for window in make_windows(open_corpus(wanted, role), tokenizer, wanted, "data"):
            for name in window.documents:
                assert seen.setdefault(name, role) == role


def test_too_much_asked_says_how_much_there_is(run, folder):
    told = r"data\.search: asks for 640 tokens, but .*texts has 491, which fill 7 sequences of 64: set tokens to 448"
    with pytest.raises(DataError, match=told):
        write_tokens("search", "search", FileText(path=folder, sequence_length=64, tokens=640), run)
    with pytest.raises(DataError, match=r"data\.evaluation\.mine: .* has 491 tokens, fewer than one sequence of 2048"):
        write_tokens("mine", "evaluation", FileText(path=folder), run)
    assert not run.tokens("search").exists() and not run.tokens("mine").exists()


def test_sequences_longer_than_learned_positions_are_refused_others_warned_of(run, folder, monkeypatch, caplog):
    def write(length, kind):
        config = {"model_type": kind, "max_position_embeddings": 32}
        (run.model / "config.json").write_text(json.dumps(config))
        write_tokens("search", "search", FileText(path=folder, sequence_length=length, tokens=2 * length), run)

    told = r"data\.search\.sequence_length: 33 tokens are more than the 32 positions .* 32 or less"
    with pytest.raises(DataError, match=told):
        write(33, "opt")
    assert not run.tokens("search").exists()
    write(32, "opt")
    monkeypatch.setattr(progress.log, "propagate", True)
    with caplog.at_level("WARNING", logger="evopress"):
        write(32, "llama")
        assert not caplog.messages
        write(33, "llama")  # rotary, though this config does not say so
    assert read_tokens(run, "search").shape == (2, 33)
    (told,) = caplog.messages
    assert told.startswith("data.search.sequence_length: 33 tokens are more than the 32 positions")


def test_tokens_between_short_documents_count(run, tmp_path):
    """Half of this text is separators: what it is said to have must be no less than what it is said to fill."""
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n' * 40)
    short = FileText(path=str(tmp_path / "short.jsonl"), sequence_length=16, tokens=128)
    with pytest.raises(DataError, match=r"has 79, which fill 4 sequences of 16: set tokens to 64"):
        write_tokens("search", "search", short, run)
    write_tokens("search", "search", short.model_copy(update={"tokens": 64}), run)


def test_empty_text_names_the_source(run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"data\.calibration: .*empty\.txt holds no text"):
        write_tokens("calibration", "calibration", FileText(path=str(tmp_path / "empty.txt"), tokens=2048), run)
    assert not run.tokens("calibration").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, folder):
    wanted = FileText(path=folder, sequence_length=64)
    small = make_results(tmp_path / "small", vocab_size=END_OF_TEXT)
    with pytest.raises(
        ModelError, match=r"gives token 258 \('<\|endoftext\|>'\), but the model's vocabulary ends at 257"
    ):
        write_tokens("search", "search", wanted, small)
    assert not small.tokens("search").exists()
    write_tokens("search", "search", wanted, make_results(tmp_path / "enough", vocab_size=END_OF_TEXT + 1))


def test_a_missing_tokenizer_or_model_is_named(run, folder, tmp_path):
    for file in run.model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        write_tokens("search", "search", FileText(path=folder, sequence_length=64), run)
    with pytest.raises(ArtifactError, match=r"model\.json: missing"):
        write_tokens("search", "search", FileText(path=folder), Run(tmp_path / "other"))


def test_rows_of_different_length_are_damage(run, folder):
    import pandas as pd

    from evopress.artifacts.provenance import Provenance
    from evopress.artifacts.tables import write_table

    frame = pd.DataFrame({"sequence": [0, 1], "documents": [["a"], ["a"]], "tokens": [[1, 2], [3]]})
    frame["starts"] = [[], []]
    write_table(frame, run.tokens("search"), TOKENS, Provenance("calibration", "{}", "abc"))
    with pytest.raises(ArtifactError, match="differ in length"):
        read_tokens(run, "search")
