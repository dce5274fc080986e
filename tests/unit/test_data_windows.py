"""Packing and cutting: nothing is lost, nothing is out of place."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evopress.data.documents import shuffled
from evopress.data.encoder import Encoded, choose, pack

SEPARATOR = 9999
lengths = st.integers(2, 12)
corpora = st.lists(st.integers(0, 30), max_size=12)


def documents(sizes: list[int]) -> list[Encoded]:
    """Documents whose tokens say where they belong: 100 x document + position."""
    return [Encoded(f"d{i}", np.arange(size, dtype=np.int32) + 100 * i) for i, size in enumerate(sizes)]


def stream(docs: list[Encoded], separator: int | None) -> list[tuple[str, int]]:
    """Oracle: every token with the document that it counts to, one by one."""
    tokens: list[tuple[str, int]] = []
    for name, ids in docs:
        if len(ids) and tokens and separator is not None:
            tokens.append((tokens[-1][0], separator))
        tokens += [(name, int(id)) for id in ids]
    return tokens


@given(corpora, lengths, st.sampled_from([None, SEPARATOR]))
def test_windows_are_the_stream_cut_every_length_tokens(sizes, length, separator):
    docs = documents(sizes)
    expected = stream(docs, separator)
    windows = list(pack(docs, length, separator))
    assert len(windows) == len(expected) // length  # only the last incomplete window is lost
    for i, window in enumerate(windows):
        part = expected[i * length : (i + 1) * length]
        assert window.tokens.tolist() == [token for _, token in part]
        assert window.tokens.dtype == np.int32
        assert window.documents == tuple(dict.fromkeys(name for name, _ in part))


@given(corpora, lengths)
def test_packing_reads_no_further_than_the_windows_that_are_taken(sizes, length):
    docs = documents([*sizes, 30])
    read: list[str] = []

    def reading():
        for doc in docs:
            read.append(doc.name)
            yield doc

    next(pack(reading(), length), None)
    needed = 0
    while sum(len(doc.tokens) for doc in docs[:needed]) < length and needed < len(docs):
        needed += 1
    assert read == [doc.name for doc in docs[:needed]]


def test_one_joined_text_is_cut_as_the_field_cuts_it():
    text = np.arange(1000, dtype=np.int32)
    windows = list(pack([Encoded("wikitext2/test", text)], 64))
    assert np.array_equal(np.stack([w.tokens for w in windows]), text[: 1000 // 64 * 64].reshape(-1, 64))
    assert {w.documents for w in windows} == {("wikitext2/test",)}


@given(corpora, lengths, st.integers(1, 40), st.integers(0, 2**32))
def test_chosen_windows_are_distinct_and_depend_on_the_seed_alone(sizes, length, count, seed):
    windows = list(pack(documents(sizes), length))
    first = choose(windows, count, np.random.default_rng(seed))
    again = choose(iter(windows), count, np.random.default_rng(seed))
    assert [id(w) for w in first] == [id(w) for w in again]
    assert len({id(w) for w in first}) == len(first) == min(count, len(windows))


def test_without_generator_the_first_windows_are_taken_in_order():
    windows = list(pack(documents([30, 30]), 6))
    assert choose(windows, 3, None) == windows[:3]
    assert choose(windows, None, None) == windows


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_shuffling_a_stream_keeps_every_item_once(items, buffer, seed):
    once = list(shuffled(range(items), buffer, np.random.default_rng(seed)))
    assert sorted(once) == list(range(items))
    assert once == list(shuffled(iter(range(items)), buffer, np.random.default_rng(seed)))


def test_shuffling_needs_only_its_buffer_to_begin():
    def endless():
        number = 0
        while True:
            yield number
            number += 1

    stream_ = shuffled(endless(), 10, np.random.default_rng(0))
    taken = [next(stream_) for _ in range(100)]
    assert taken != sorted(taken) and max(taken) < 110
