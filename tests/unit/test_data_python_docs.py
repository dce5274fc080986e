"""The embedded text: roles share neither topics nor paragraphs."""

from itertools import combinations
from pydoc_data.topics import topics

from hypothesis import given
from hypothesis import strategies as st

from evopress.data.sources import SHARES, families, paragraphs, python_docs, split_topics

quotes = [letter * 120 for letter in "abcdefgh"]
libraries = st.dictionaries(
    st.text("tuvwxyz", min_size=1, max_size=3), st.lists(st.sampled_from(quotes), max_size=3).map("\n\n".join)
)


def test_every_role_has_its_share_of_cpython_topics():
    roles = split_topics(topics)
    size = {role: sum(len(topics[name]) for name in names) for role, names in roles.items()}
    for role, share in SHARES.items():
        assert abs(size[role] / sum(size.values()) - share) < 0.05, role
    assert sum(size.values()) > 300_000


def test_no_topic_and_no_paragraph_serves_two_roles():
    roles = {role: {d.name: d.text for d in python_docs(role)} for role in SHARES}
    for one, other in combinations(roles.values(), 2):
        assert one.keys().isdisjoint(other)
        assert paragraphs("\n\n".join(one.values())).isdisjoint(paragraphs("\n\n".join(other.values())))


def test_what_is_left_out_stands_in_what_is_kept():
    kept = {name for names in split_topics(topics).values() for name in names}
    text = paragraphs("\n\n".join(topics[name] for name in kept))
    for name in set(topics) - kept:
        assert paragraphs(topics[name]) <= text, name


@given(libraries)
def test_any_library_of_topics_is_split_without_overlap(library):
    roles = split_topics(library)
    names = [name for members in roles.values() for name in members]
    assert len(names) == len(set(names)) and set(names) <= set(library)
    for one, other in combinations(roles.values(), 2):
        assert not {p for n in one for p in paragraphs(library[n])} & {p for n in other for p in paragraphs(library[n])}
    everything = {p for text in library.values() for p in paragraphs(text)}
    assert {p for name in names for p in paragraphs(library[name])} == everything
    assert split_topics(dict(reversed(library.items()))) == roles


@given(libraries)
def test_families_are_the_connected_components(library):
    found = families(library)
    assert sorted(name for family in found for name in family) == sorted(library)
    for one, other in combinations(found, 2):
        assert not {p for n in one for p in paragraphs(library[n])} & {p for n in other for p in paragraphs(library[n])}
    for family in found:  # and connected: growing from one member reaches all
        reached, quoted = {family[0]}, paragraphs(library[family[0]])
        for _ in family:
            for name in family:
                if paragraphs(library[name]) & quoted:
                    reached.add(name)
                    quoted |= paragraphs(library[name])
        assert reached == set(family)
