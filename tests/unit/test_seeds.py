"""Searches with several seeds: the same as if written out, and known by the name in the settings file."""

from typing import Any

import pytest
from test_config import BASE, FLAT, load

from evopress.util.errors import ConfigError
from evopress.workflow import slices
from evopress.workflow.searches import groups

Q3 = BASE["searches"]["q3"]


def searches(**entries: Any) -> dict[str, Any]:
    return {"searches": entries}


def test_a_search_with_seeds_is_what_its_repetitions_written_out_are() -> None:
    short = load(searches(q3={"seeds": [0, 7]}))
    written = load(searches(**{"q3": None, "q3-seed0": {**Q3, "seed": 0}, "q3-seed7": {**Q3, "seed": 7}}))
    assert set(short.searches) == set(written.searches) == {"q3-seed0", "q3-seed7", "flat"}
    for name in short.searches:
        assert slices.search_slice(short, name) == slices.search_slice(written, name)


def test_searches_are_grouped_by_the_name_in_the_settings() -> None:
    settings = load(searches(**{"q3": {"seeds": [2, 0]}, "x-seed1": FLAT, "y-seed0": {**Q3, "seed": 0}}))
    assert groups(settings.searches) == {
        "q3": ["q3-seed2", "q3-seed0"],
        "flat": ["flat"],
        "x-seed1": ["x-seed1"],
        "y-seed0": ["y-seed0"],
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"q3": {"seed": 0, "seeds": [1]}}, "searches.q3: seed and seeds are both given"),
        ({"q3": {"seeds": [1, 1]}}, "searches.q3: seeds: name at least one, and each once; got [1, 1]"),
        ({"q3": {"seeds": []}}, "searches.q3: seeds: name at least one"),
        ({"q3": {"seeds": [-1]}}, "searches.q3.seeds.0: Input should be greater than or equal to 0"),
        ({"flat": {"seeds": [1]}}, "searches.flat: unknown key 'seeds'"),
        ({"q3": {"seeds": [0]}, "q3-seed0": FLAT}, "searches: seeds of 'q3' make a search 'q3-seed0', which is there"),
        ({"q" * 60: {**Q3, "seeds": [0]}}, "cannot name a file"),
        ({"dense": {**Q3, "seeds": [0]}}, "searches.dense: the name is taken by the uncompressed model"),
        ({"q3": {"seeds": [0, 1], "target": 1}}, "searches.q3.target: 1 bits is below the lowest level (2)"),
    ],
)
def test_refusals_speak_of_what_was_written_and_once(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(searches(**entries))
    [line] = str(error.value).splitlines()
    assert message in line
