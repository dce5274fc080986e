"""A front: one search for each size, from shared effects; sizes that cannot be; larger files are no worse."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from search_run import search_with_effects
from test_config import BASE, load
from test_file_size import COMPUTE, SMALL, prepared, smallest_and_largest

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, read_table
from evopress.config.context import StageContext
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.search.resume import ResumeFolder
from evopress.search.strategies.front import Front
from evopress.search.target import SizeTarget, size_name
from evopress.util.errors import ConfigError
from evopress.workflow import slices
from evopress.workflow.foreseen import require_fit
from evopress.workflow.keys import Keys
from evopress.workflow.searches import groups, repeated, with_file, written_name

SETTINGS: dict[str, Any] = {"strategy": "front", "variants": "gptq", "survivors": [2, 1], "tokens": [2048, 4096]}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 256, "vocab_size": 96}


def front(**values: Any) -> dict[str, Any]:
    return {"searches": {"q3": None, "flat": None, "front": {**SETTINGS, **values}}}


def test_a_front_is_one_search_for_each_size() -> None:
    settings = load(front(sizes=["55 MB", 65_500_000, "1.5 GB"]))
    assert list(settings.searches) == ["front-55mb", "front-65.5mb", "front-1.5gb"]
    assert [search.target.bytes for search in settings.searches.values()] == [55_000_000, 65_500_000, 1_500_000_000]  # type: ignore[union-attr]
    assert {written_name(name, search) for name, search in settings.searches.items()} == {"front"}
    assert len(slices.effects(settings)) == 1
    alone = load(front(sizes=["55 MB"]))
    assert slices.search_slice(alone, "front-55mb") == slices.search_slice(settings, "front-55mb")


def test_ends_and_a_number_of_points_give_even_sizes_with_short_names() -> None:
    settings = load(front(**{"from": "72 MB", "to": "96 MB", "points": 8}))
    sizes = ["72", "75.4", "78.9", "82.3", "85.7", "89.1", "92.6", "96"]
    assert list(settings.searches) == [f"front-{size}mb" for size in sizes]


def test_a_front_with_seeds_is_a_search_for_each_size_and_seed() -> None:
    settings = load(front(sizes=["55 MB", "65 MB"], seeds=[0, 3]))
    assert groups(settings.searches) == {
        f"front-{size}mb": [f"front-{size}mb-seed0", f"front-{size}mb-seed3"] for size in (55, 65)
    }
    assert {written_name(name, search) for name, search in settings.searches.items()} == {"front"}
    assert len(slices.effects(settings)) == 1


def test_what_a_size_depends_on_is_not_the_other_sizes() -> None:
    two, three = (load(front(sizes=sizes)) for sizes in (["55 MB", "75 MB"], ["55 MB", "65 MB", "75 MB"]))
    for name in two.searches:
        assert Keys(two).search(name) == Keys(three).search(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "searches.front: has no sizes: give sizes, as in"),
        ({"sizes": []}, "searches.front: has no sizes"),
        ({"sizes": ["75 MB", "65 MB"]}, "sizes: 65 MB comes after 75 MB; name them in ascending order"),
        ({"sizes": ["65 MB", "65 MB"]}, "sizes: 65 MB comes twice; keep one of them"),
        ({"sizes": ["65 MB"], "points": 3}, "sizes and points are both given"),
        ({"sizes": ["65 MB"], "from": 1, "to": 2, "points": 3}, "sizes and from and to and points are both given"),
        ({"from": "55 MB", "points": 3}, "from and points without to: give all of from, to and points, or sizes"),
        ({"from": "75 MB", "to": "65 MB", "points": 2}, "sizes: 65 MB comes after 75 MB"),
        (
            {"from": "65 MB", "to": "65.1 MB", "points": 9},
            "sizes: 65 MB comes twice; keep one of them, or ask for fewer",
        ),
        (
            {"from": "55 MB", "to": "65 MB", "points": 1},
            "searches.front.points: Input should be greater than or equal to 2",
        ),
        ({"sizes": ["65 miles"]}, "searches.front.sizes.0: '65 miles' is no size"),
        ({"sizes": ["65 MB"], "target": {"bytes": 3}}, "target and sizes are both given"),
        (
            {"target": {"bytes": 3}},
            "searches.front: has no sizes: give sizes, as in [55 MB, 65 MB, 75 MB], in place of",
        ),
        ({"target": 3.0}, "target: a front is of sizes of the file"),
        ({"form": "55 MB"}, "unknown key 'form': did you mean 'from'?"),
        ({"sizes": ["65 MB"], "final_tokens": 1 << 30}, "searches.front.final_tokens: 1073741824 tokens are more than"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_words_of_the_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(front(**values))
    [line] = str(error.value).splitlines()
    assert message in line


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match="sizes of 'q3' make a search 'q3-65mb', which is there already"):
        load({"searches": {"q3": {**SETTINGS, "sizes": ["65 MB"]}, "q3-65mb": BASE["searches"]["flat"]}})
    with pytest.raises(ConfigError, match=r"searches\.a\.start_from: 'front' stands for several searches; name one of"):
        load(
            {
                "searches": {
                    **front(sizes=["55 MB", "65 MB"])["searches"],
                    "a": {**BASE["searches"]["q3"], "start_from": ["front"]},
                }
            }
        )


def test_sizes_closer_than_the_smallest_step_of_a_layer_are_refused() -> None:
    """Of a layer of 128 x 128 weights, a bit more is 2,080 bytes with zeros of groups."""
    require_fit(load(front(sizes=[100_000, 102_080])), LLAMA)
    expected = (
        r"searches\.front\.sizes: 0\.1 MB and 0\.102 MB are closer than the smallest step between two levels "
        r"of a layer \(2,080 bytes\); name sizes further apart"
    )
    with pytest.raises(ConfigError, match=expected):
        require_fit(load(front(sizes=[100_000, 102_079])), LLAMA)
    require_fit(load(front(sizes=[100_000, 102_079])), {})  # of a model that is not known, nothing is foreseen


# --- on a tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared(tmp_path_factory.mktemp("front"), tied=False)


def sizes_of(run: Run, points: int = 4) -> list[int]:
    low, high = smallest_and_largest(run)
    return [low + (high - low) * index // (points - 1) for index in range(points)]


def searches_of(sizes: list[int]) -> dict[str, Front]:
    values = {key: value for key, value in SMALL.items() if key != "group_rule"}
    asked = Front(variants="v", sizes=sizes, exports=("gguf",), sensitivity_tokens=24, final_tokens=48, **values)
    return {name: with_file(one, "") for name, one in repeated({"front": asked}).items()}  # type: ignore[misc]


def final(run: Run, name: str) -> float:
    trace = read_table(run.trace(name), TRACE)
    last = trace[trace["generation"] == trace["generation"].max()]
    assert len(last) == 1 and last["tokens"].item() == 48
    return float(last["fitness"].item())


def test_each_point_meets_its_size_and_a_larger_one_is_no_worse_on_the_search_text(run: Run) -> None:
    sizes, context = sizes_of(run), StageContext(run, COMPUTE)
    judged = []
    for (name, search), size in zip(searches_of(sizes).items(), sizes, strict=True):
        assert name == f"front-{size_name(size)}"
        search_with_effects(context, name, search)
        for form in (HuggingFace(), GgufFile()):
            run_export(context, name, form)
        (file,) = run.export(name, "gguf").glob("*.gguf")
        assert 0.99 * size < file.stat().st_size <= size
        judged.append(final(run, name))
    assert all(larger < smaller for smaller, larger in pairwise(judged))


def test_a_front_measures_single_effects_once(run: Run) -> None:
    searches = searches_of(sizes_of(run, 3))
    names = {search.effects().name for search in searches.values()}  # type: ignore[union-attr]
    assert len(names) == 1
    for name, search in searches.items():
        search_with_effects(StageContext(run, COMPUTE), name, search)
        own = read_table(run.trace(name), TRACE)["tokens"].sum()
        effects = read_table(run.effects_effort(*names), EFFORT)["tokens"][0]
        assert read_table(run.effort(name), EFFORT)["tokens"][0] == own + effects


@pytest.mark.parametrize("rounds", [1, 3, 4])
def test_a_point_that_was_killed_ends_with_the_same_bytes(
    run: Run, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, search), context = list(searches_of(sizes_of(run)).items())[1], StageContext(run, COMPUTE)
    search_with_effects(context, name, search)
    whole, original, saved = (
        [path.read_bytes() for path in (run.configuration(name), run.trace(name))],
        ResumeFolder.save,
        [],
    )

    def save_and_die(self: ResumeFolder, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        saved.append(1)
        if len(saved) == rounds:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResumeFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            search_with_effects(context, name, search)
    search_with_effects(context, name, search)
    assert [path.read_bytes() for path in (run.configuration(name), run.trace(name))] == whole


def test_a_size_beyond_what_the_levels_allow_is_refused_with_the_bound(run: Run) -> None:
    low, high = smallest_and_largest(run)
    for size, bound in ((low - 1, "below the smallest file"), (high + 1, "above the largest file")):
        (search,) = searches_of([size]).values()
        with pytest.raises(
            ConfigError, match=rf"searches\.front-small\.target: .* is {bound} \(.*; choose a size between"
        ):
            search_with_effects(StageContext(run, COMPUTE), "front-small", search)


def test_the_final_tokens_are_the_same_for_all_sizes_and_seeds(run: Run) -> None:
    drawn = set()
    for name, search in searches_of(sizes_of(run)[1:3]).items():
        for seed in (0, 1):
            seeded = search.model_copy(update={"seed": seed, "final_tokens": 24})
            search_with_effects(StageContext(run, COMPUTE), name, seeded)
            drawn.add(tuple(read_table(run.trace(name), TRACE)["sequences"].iloc[-1]))
    assert len(drawn) == 1
    chosen = read_table(run.configuration(name), CONFIGURATION)
    assert np.isfinite(chosen["value"]).all() and isinstance(search.target, SizeTarget)
