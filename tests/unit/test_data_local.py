"""Local files: what is read, what it is called, and what is said when it cannot be."""

import json

import pandas as pd
import pytest

from evopress.data.documents import Column, Conversation, Document, find_files, read_files
from evopress.util.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("The second file.\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n{"text": "zwölf"}\n', encoding="utf-8")
    (tmp_path / "deep").mkdir()
    pd.DataFrame({"text": ["x", None, "z"], "id": [1, 2, 3]}).to_parquet(tmp_path / "deep" / "c.parquet")
    (tmp_path / "notes.md").write_text("not text of ours")
    return tmp_path


def test_a_folder_is_read_in_order_with_names_that_find_the_line(folder):
    assert list(read_files(str(folder))) == [
        Document("a.jsonl:1", "one"),
        Document("a.jsonl:3", ""),
        Document("a.jsonl:4", "zwölf"),
        Document("b.txt", "The second file.\n"),
        Document("deep/c.parquet:0", "x"),
        Document("deep/c.parquet:1", ""),
        Document("deep/c.parquet:2", "z"),
    ]


@pytest.mark.parametrize(("name", "text"), [("w.txt", "one\r\n"), ("w.jsonl", '{"text": "one\\n"}\r\n')])
def test_the_byte_order_mark_of_windows_is_no_text(name, text, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [document.text for document in read_files(str(tmp_path / name))] == ["one\n"]


def test_a_file_and_a_glob_pattern_relative_or_absolute(folder, monkeypatch):
    assert find_files(str(folder / "b.txt")) == [folder / "b.txt"]
    assert find_files(str(folder / "**" / "*.parquet")) == [folder / "deep" / "c.parquet"]
    monkeypatch.chdir(folder)
    assert [str(file) for file in find_files("*.[jt]*")] == ["a.jsonl", "b.txt"]


def test_markdown_is_read_where_it_is_named(folder):
    for name in ("README.md", "deep/notes.rst"):
        (folder / name).write_text(name)
    assert not {file.suffix for file in find_files(str(folder))} & {".md", ".rst"}
    assert find_files(str(folder / "*")) == [folder / "a.jsonl", folder / "b.txt"]
    for pattern, name in (("README.md", "README.md"), ("**/*.rst", "deep/notes.rst")):
        assert [document.text for document in read_files(str(folder / pattern))] == [name]


def test_a_folder_of_other_files_says_which_are_read(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(DataError, match=r"no file in it ends in \.jsonl, .* by a pattern, as in .*/\*\*/\*\.md"):
        find_files(str(tmp_path))


def test_nothing_found_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"missing.*\.jsonl, \.parquet, \.txt"):
        find_files(str(tmp_path / "missing"))
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(DataError, match=r"x\.pdf: cannot be read as text"):
        find_files(str(tmp_path / "x.pdf"))


def test_broken_json_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: is not JSON"):
        list(read_files(str(tmp_path)))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_column_names_those_that_are_there(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    if suffix == "jsonl":
        file.write_text(json.dumps({"content": "a", "url": "b"}))
    else:
        pd.DataFrame({"content": ["a"], "url": ["b"]}).to_parquet(file)
    with pytest.raises(DataError, match=r"no column 'text', but 'content', 'url'; set `column`"):
        list(read_files(str(file)))
    assert [d.text for d in read_files(str(file), Column("content"))] == ["a"]


def test_a_column_of_numbers_is_refused(tmp_path):
    pd.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet:0: column 'text' holds int, not text"):
        list(read_files(str(tmp_path)))


def test_files_that_are_not_what_they_say(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"x\.parquet: is not a readable parquet file"):
        list(read_files(str(tmp_path / "x.parquet")))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x\.txt: is not UTF-8"):
        list(read_files(str(tmp_path / "x.txt")))


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_messages_are_conversations(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    if suffix == "jsonl":
        file.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    else:
        other = [{**MESSAGES[0], "name": "Ann"}]  # parquet gives every message all keys that one of them has
        pd.DataFrame({"messages": [MESSAGES, other]}).to_parquet(file)
    document = next(read_files(str(file), Column("messages", messages=True)))
    assert isinstance(document, Conversation) and document.messages == MESSAGES


@pytest.mark.parametrize("column", ["text", "messages"])
def test_rows_of_messages_taken_for_text_tell_what_to_set(tmp_path, column):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": 1, "messages": MESSAGES}))
    with pytest.raises(DataError, match=r"x\.jsonl:1: .*column 'messages' holds a conversation.* `messages: true`"):
        list(read_files(str(tmp_path), Column(column)))


def test_text_taken_for_conversations_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"messages": "Hi"}')
    with pytest.raises(DataError, match=r"x\.jsonl:1: column 'messages' holds no conversation: .*'role' and 'content'"):
        list(read_files(str(tmp_path / "x.jsonl"), Column("messages", messages=True)))
    (tmp_path / "x.txt").write_text("Hi")
    with pytest.raises(DataError, match=r"x\.txt: `messages: true` reads conversations from \.jsonl or \.parquet"):
        list(read_files(str(tmp_path / "x.txt"), Column("messages", messages=True)))
