"""Samples of large files: from all over them, each piece once, at a cost that follows what is asked for."""

import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from test_data_tokens import byte_tokenizer, make_windows

from evopress.config.data import FileText
from evopress.data import sampling, sources
from evopress.data.documents import TEXT, Column, Conversation, Passage, named_files, read_files
from evopress.data.sampling import sampled, shuffled_range
from evopress.data.sources import open_corpus

ROWS = [f"row {number:05d} " + "zwölf " * (number % 9) for number in range(3000)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """So that files of a test are large ones."""
    for module in (sampling, sources):
        monkeypatch.setattr(module, "SMALL", 1000)


def write(path, rows):
    """A file of rows, of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 7, "text": row}, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pd.DataFrame({"id": 7, "text": rows}).to_parquet(path, row_group_size=400)
    else:
        path.write_text("".join(row + "\n" for row in rows))
    return path


def drawn(path, length=64, tokens=256, seed=0, column=TEXT):
    return list(sampled(named_files(str(path)), column, length, tokens, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize("length", [16, 64, 5000])
def test_all_slots_together_hold_every_row_once(name, length, tmp_path):
    path = write(tmp_path / name, ROWS)
    found = drawn(path, length)
    assert Counter(document.text for document in found) == Counter(ROWS)
    if length < 5000:
        assert [document.text for document in found] != ROWS
    assert found == drawn(path, length) != drawn(path, length, seed=1)


@pytest.mark.parametrize("text", ["".join(row + "\n" for row in ROWS), "zwölf " * 9000, "ö" * 30000], ids=len)
@pytest.mark.parametrize("length", [2, 64])
def test_passages_of_a_text_file_are_the_whole_text(text, length, tmp_path):
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    found = sorted(drawn(tmp_path / "x.txt", length), key=lambda passage: int(passage.name.split("@")[1]))
    assert "".join(passage.text for passage in found) == text
    assert all(isinstance(passage, Passage) for passage in found)


def test_a_folder_gives_its_small_files_whole_and_once(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", ROWS[:50])
    write(tmp_path / "deep" / "b.parquet", ROWS[50:90])
    for number in range(90, 120):
        (tmp_path / "deep" / f"{number}.txt").write_text(ROWS[number])
    (tmp_path / "empty.txt").write_text("")
    pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(tmp_path / "none.parquet")
    found = drawn(tmp_path)
    assert sorted(document.text for document in found) == sorted(ROWS[:120])
    assert {"deep/90.txt", "deep/b.parquet:0", "a.jsonl@0"} <= {document.name for document in found}


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_long_rows_give_passages_from_all_over_them(name, tmp_path):
    books = [" ".join(f"{book}.{word}" for word in range(4000)) for book in range(6)]
    found = drawn(write(tmp_path / name, books), length=32)
    assert all(isinstance(passage, Passage) and len(passage.text) <= 8 * 32 for passage in found)
    for book, text in enumerate(books):
        passages = [passage.text for passage in found if passage.text in text]
        places = [text.index(passage) for passage in passages]
        assert len(set(places)) == len(places) and sum(map(len, passages)) > 0.9 * len(text), book


def test_conversations_are_never_cut(tmp_path):
    chats = [[{"role": "user", "content": "w " * 900}], [{"role": "user", "content": "x"}]] * 20
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    found = drawn(path, length=8, column=Column("messages", messages=True))
    assert all(isinstance(document, Conversation) for document in found)
    assert Counter(len(document.messages[0]["content"]) for document in found) == {1800: 20, 1: 20}


class Counting:
    """A tokenizer of bytes that counts the characters it was given."""

    def __init__(self):
        self.inner, self.characters = byte_tokenizer(), 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.inner(text, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.txt"])
def test_a_sample_tokenizes_what_it_needs_and_comes_from_all_over_the_file(name, tmp_path):
    rows = [f"{number:06d} " + "abcdefg " * 10 for number in range(20_000)]
    path, tokenizer = write(tmp_path / name, rows), Counting()
    settings = FileText(path=str(path), tokens=128 * 32, sequence_length=128)
    windows = make_windows(open_corpus(settings, "calibration"), tokenizer, settings, "data.calibration")
    assert tokenizer.characters < 12 * 128 * 32  # of 1.7 million
    text = " ".join(byte_tokenizer().decode(window.tokens) for window in windows)
    tenths = {int(number) // 2000 for number in re.findall(r"\d{6}", text)}
    assert len(windows) == 32 and len(tenths) >= 8
    again = make_windows(open_corpus(settings, "calibration"), byte_tokenizer(), settings, "data.calibration")
    assert [window.tokens.tolist() for window in again] == [window.tokens.tolist() for window in windows]


def test_held_out_text_is_the_beginning_of_a_large_file_and_no_more_is_read(tmp_path):
    path, tokenizer = write(tmp_path / "x.txt", ROWS), Counting()
    settings = FileText(path=str(path), tokens=256, sequence_length=32)
    windows = make_windows(open_corpus(settings, "evaluation"), tokenizer, settings, "data.evaluation.x")
    assert (
        byte_tokenizer()
        .decode(np.concatenate([w.tokens for w in windows]))
        .startswith("".join(row + "\n" for row in ROWS)[:200])
    )
    assert tokenizer.characters < 20 * 256


def test_what_a_sample_left_out_is_read_where_it_does_not_suffice(tmp_path):
    """Spaces make few tokens here, so passages of eight bytes a token hold less than a window."""
    text = "".join(f"{number:03d}{' ' * 60}\n" for number in range(700))

    class Sparing(Counting):
        def __call__(self, text, **options):
            return super().__call__(text.replace(" ", ""), **options)

    (tmp_path / "x.txt").write_text(text)
    settings = FileText(path=str(tmp_path / "x.txt"), tokens=2560, sequence_length=64)
    windows = make_windows(open_corpus(settings, "search"), Sparing(), settings, "data.search")
    assert len(windows) == 40


def test_numbers_come_once_and_in_no_order():
    for count in (0, 1, 2, 9, 1000):
        numbers = list(shuffled_range(count, np.random.default_rng(0)))
        assert sorted(numbers) == list(range(count))
    assert numbers != sorted(numbers)
    first = shuffled_range(10**15, np.random.default_rng(0))
    assert len({next(first) for _ in range(100)}) == 100


def test_small_files_are_read_whole_as_ever(tmp_path):
    path = write(tmp_path / "x.jsonl", ROWS[:8])
    corpus = open_corpus(FileText(path=str(path), tokens=64, sequence_length=32), "search")
    assert corpus.order == "windows" and list(corpus.documents) == list(read_files(str(path)))
