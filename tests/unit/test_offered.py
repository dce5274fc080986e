"""What exports ask of searches: levels that are offered, and layers that share one."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from search_run import COMPUTE, MIXED, SETTINGS, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS, read_table, settings_of
from evopress.cli.import_config import facts_of
from evopress.compression.families import BITS
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.search.base import Strategy
from evopress.search.configuration import Configuration, parse_candidate
from evopress.search.offered import Constraints, merged, only_levels, tied_units
from evopress.search.problem import SearchProblem, open_variants
from evopress.search.run import run_search
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.random import RandomSearch
from evopress.search.strategies.uniform import Uniform
from evopress.util.errors import ConfigError
from evopress.workflow.keys import Keys
from evopress.workflow.settings import Settings
from evopress.workflow.slices import search_slice

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
TEXT = {"source": "python_docs", "tokens": 4096, "sequence_length": 512}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("offered"))


def problem(run: Run, rule: Any = "size", **asked: Any) -> SearchProblem:
    return open_variants(run, ["gptq"], Constraints("searches.q", 3.0, rule, **asked))


def level_sets(configuration: pd.DataFrame) -> list[set[str]]:
    """Levels of the layers of each tie in each block."""
    kinds = configuration["layer"].str.rpartition(".")[2]
    return [set(rows["level"]) for tie in FUSED for _, rows in configuration[kinds.isin(tie)].groupby("block")]


def test_tied_layers_are_one_unit_with_what_they_cost_together(run: Run) -> None:
    alone, tied = problem(run).space.units, problem(run, tied=FUSED).space.units
    assert len(alone) == 14 and len(tied) == 8  # of each block: qkv, o, gate and up, down
    unit, layers = tied[0], alone[:3]
    assert unit.name == "model.layers.0.self_attn.q_proj+k_proj+v_proj" and unit.block == 0
    assert [layer.name for layer in unit.layers] == [layer.name for layer in layers]
    assert unit.parameters == sum(layer.parameters for layer in layers)
    for number, level in enumerate(unit.levels):
        own = [layer.levels[number] for layer in layers]
        assert level.label == own[0].label and level.value == own[0].value
        assert (level.cost, level.bytes) == (sum(each.cost for each in own), sum(each.bytes for each in own))
        assert level.error == pytest.approx(sum(each.error for each in own), rel=1e-12)
    assert [unit for unit in tied if not unit.members] == [
        unit for unit in alone if unit.layer.endswith(("o_proj", "down_proj"))
    ]


def test_groups_of_tied_units_follow_the_rule(run: Run) -> None:
    by_rule = {rule: problem(run, rule, tied=FUSED).space.units[0].group for rule in ("size", "name", "none")}
    assert by_rule == {"size": str(16 * (16 + 8 + 8)), "name": "q_proj+k_proj+v_proj", "none": "all"}


def test_ties_that_name_a_layer_in_common_are_one() -> None:
    assert merged((("b", "a"), ("d", "c"), ("c", "b"))) == (("a", "b", "c", "d"),)
    assert merged((("b", "a"), ("d", "c"))) == (("a", "b"), ("c", "d")) == merged((("c", "d"), ("a", "b")))


def test_tied_layers_offer_what_all_of_them_have(run: Run) -> None:
    table = VariantStore(run, "gptq").table
    fewer = table[~((table["layer"] == "self_attn.k_proj") & (table["level"] == "3"))]
    unit = tied_units(BITS.units(fewer, "size"), FUSED, "size", "searches.q")[0]
    assert [level.label for level in unit.levels] == ["2", "4"]
    assert [[level.label for level in layer.levels] for layer in unit.layers] == [["2", "4"]] * 3
    without = table[~((table["layer"] == "self_attn.k_proj") & (table["level"] != "3"))]
    other = without[~((without["layer"] == "self_attn.q_proj") & (without["level"] == "3"))]
    with pytest.raises(ConfigError, match=r"searches\.q\.tied: .*q_proj and .*v_proj share a level, but have none"):
        tied_units(BITS.units(other, "size"), FUSED, "size", "searches.q")


def test_other_levels_are_not_offered(run: Run) -> None:
    units = problem(run, levels=("2", "4")).space.units
    assert {tuple(level.label for level in unit.levels) for unit in units} == {("2", "4")}
    with pytest.raises(
        ConfigError, match=r"searches\.q\.levels: model\..*q_proj has the levels 2, 3, 4, and none of 8"
    ):
        problem(run, levels=("8",))
    table = VariantStore(run, "gptq").table
    assert only_levels(table, None, "searches.q") is table


@pytest.mark.parametrize(
    "strategy",
    [
        SETTINGS,
        MIXED,
        RandomSearch(variants="gptq", target=2.7, generations=2, offspring=4, survivors=(1,), tokens=(24,)),
        Greedy(variants="gptq", target=3.0, tokens=24, per_round=4),
        DynamicProgramming(variants="gptq", target=3.0),
        DynamicProgramming(variants="gptq", target=3.0, errors="propagated", tokens=24),
        Uniform(variants="gptq", target=3.0),
    ],
    ids=lambda strategy: f"{strategy.strategy}-{strategy.target}",
)
def test_every_strategy_keeps_ties_and_budget(strategy: Strategy, run: Run, tmp_path: Path) -> None:
    own, tied = fresh(run, tmp_path / "own"), strategy.model_copy(update={"tied": FUSED})
    run_search(StageContext(own, COMPUTE), "q", tied)
    table = Configuration.read(own, "q").table
    assert set(table["unit"]) == set(read_table(own.layers, LAYERS)["name"]) and len(table) == 14
    assert all(len(levels) == 1 for levels in level_sets(table))
    assert table["cost"].sum() <= strategy.target * table["parameters"].sum()
    made = VariantStore(own, "gptq").table.set_index(["name", "level"])
    chosen = made.loc[list(zip(table["unit"], table["level"], strict=True))]
    assert table["bytes"].tolist() == chosen["bytes"].tolist()
    assert settings_of(own.configuration("q"))["tied"] == [list(tie) for tie in FUSED]


def test_a_tied_search_judges_what_its_layers_compute(run: Run, tmp_path: Path) -> None:
    """With every layer at its dearest level, tied and untied searches judge the same model."""
    own = fresh(run, tmp_path / "own")
    for name, tied in (("alone", ()), ("tied", FUSED)):
        strategy = Greedy(variants="gptq", target=2.0, tokens=24, per_round=100, tied=tied)
        run_search(StageContext(own, COMPUTE), name, strategy)
    first = [pd.read_parquet(own.trace(name)).iloc[0]["fitness"] for name in ("alone", "tied")]
    assert first[0] == first[1]
    assert {"2"} == set(Configuration.read(own, "tied").table["level"])


def test_texts_name_layers_and_must_keep_ties(run: Run) -> None:
    space = problem(run, tied=FUSED).space
    lines = {layer.name: "3" for unit in space.units for layer in unit.layers}
    candidate = parse_candidate("".join(f"{n}: {level}\n" for n, level in lines.items()), space, 2, "file")
    assert candidate.tolist() == [1] * 8
    lines["model.layers.1.mlp.up_proj"] = "4"
    text = "".join(f"{name}: {level}\n" for name, level in lines.items())
    with pytest.raises(
        ConfigError, match=r"file, line 13: model\.layers\.1\.mlp\.up_proj is at 4 and model\.layers\.1\.mlp"
    ):
        parse_candidate(text, space, 2, "file")


def test_facts_count_layers(run: Run) -> None:
    tied = problem(run, tied=FUSED)
    first, second = facts_of(tied, np.ones(8, dtype=np.int16), 3.0)
    assert first.startswith("14 layers, 3 bits per weight on average") and second == "layers by level: 3: 14"


def test_what_another_search_found_is_brought_to_the_ties(run: Run) -> None:
    alone, space = problem(run), problem(run, tied=FUSED).space
    found = Configuration.of_candidate(alone, np.array([2, 0, 0, 1, 2, 2, 0] * 2, dtype=np.int16))
    # q has twice the weights of k and of v: (2 x 4 + 2 + 2) / 4 = 3 bits.
    assert found.nearest(space).tolist() == [1, 1, 2, 0] * 2
    back = Configuration.of_candidate(problem(run, tied=FUSED), found.nearest(space))
    assert back.nearest(space).tolist() == [1, 1, 2, 0] * 2


# --- what exports ask, by the settings -------------------------------------------------------------------------------


def settings(exports: Any, method: dict[str, Any] | None = None, **search: Any) -> Settings:
    made = {"bits": [2, 3, 4, 8], "group_size": 128, "symmetric": True} | (method or {})
    if made.setdefault("method", "gptq") != "gptq":
        made = {"method": made["method"]}
    own = {"strategy": "evolution", "variants": "v", "target": 5, "tokens": [512, 512, 512]} | search
    if own["strategy"] == "uniform":
        del own["tokens"]
    return Settings.load(
        {
            "name": "run",
            "model": {"source": "folder", "path": "/nowhere"},
            "data": {"calibration": TEXT, "search": TEXT, "evaluation": {"held_out": TEXT}},
            "variants": {"v": made},
            "searches": {"s": own | ({"exports": exports} if exports else {})},
        }
    )


def test_an_exporter_asks_for_ties_and_levels() -> None:
    asked = settings(["compressed_tensors"])
    search = asked.searches["s"]
    assert search.tied == (("gate_proj", "up_proj"), ("k_proj", "q_proj", "v_proj")) and search.levels == ("4", "8")
    assert '"levels":["4","8"]' in search_slice(asked, "s")
    by_hand = settings(None, tied=[list(tie) for tie in search.tied], levels=["4", "8"])
    assert search_slice(by_hand, "s") == search_slice(asked, "s")
    assert Keys(by_hand).search("s") == Keys(asked).search("s")
    more = settings(["compressed_tensors"], tied=[["o_proj", "v_proj"]], levels=["2", "4", "8"])
    assert more.searches["s"].tied[1] == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert more.searches["s"].levels == ("4", "8")


def test_where_nothing_is_asked_the_slice_is_as_before() -> None:
    plain = search_slice(settings(None), "s")
    assert '"tied"' not in plain and '"levels"' not in plain
    assert search_slice(settings(["archive"]), "s") == plain
    own = {"exporter": "compressed_tensors", "runtime": "transformers"}
    assert search_slice(settings([own]), "s") == plain
    bigger = {"exporter": "compressed_tensors", "shard_bytes": 9}  # which no search depends on
    assert search_slice(settings([bigger]), "s") == search_slice(settings(["compressed_tensors"]), "s") != plain


@pytest.mark.parametrize(
    ("exports", "method", "search", "message"),
    [
        (
            ["compressed_tensors"],
            {},
            {"target": 3},
            r"s\.target: 3 bits is below the lowest level \(4\) \(`levels` and e",
        ),
        (["compressed_tensors"], {"symmetric": False}, {}, r"s\.target: 5 bits is above the highest level \(4\)"),
        (["compressed_tensors"], {}, {"strategy": "uniform", "target": 3}, r"below the lowest level"),
        (["compressed_tensors"], {"method": "gguf"}, {}, r"s\.exports: compressed_tensors holds integers with scales"),
        (["compressed_tensors"], {"bits": [2, 3]}, {"target": 3}, r"vLLM's kernels have none; make variants at 4 bits"),
        (
            ["compressed_tensors"],
            {},
            {"levels": ["2", "3"]},
            r"s\.levels: none of 'v' is left that all exports can write",
        ),
        (None, {}, {"levels": ["4", "5"]}, r"s\.levels: 'v' has no level '5'; its levels are 2, 3, 4, 8"),
        (None, {}, {"levels": ["3", "4"]}, r"s\.target: 5 bits is above the highest level \(4\) .* leave 3, 4 of 2, 3"),
        (
            None,
            {"method": "gguf"},
            {"levels": ["Q3_K", "Q4_K"]},
            r"5 bits is above the largest type \(Q4_K, .*leave Q3_K, Q4",
        ),
        (None, {}, {"levels": []}, r"s\.levels: is empty: give at least one entry"),
        (None, {}, {"levels": [4]}, r"s\.levels\.0: must be text: put it in quotes, '4'"),
        (
            None,
            {"method": "drop"},
            {"target": 1, "levels": ["keep"]},
            r"s\.levels: is for linear layers, and 'v' drops",
        ),
        (
            None,
            {"method": "drop"},
            {"target": 1, "tied": [["a", "b"]]},
            r"s\.tied: is for linear layers, and 'v' drops",
        ),
        (["compressed_tensors"], {"method": "drop"}, {"target": 1}, r"s\.exports: compressed_tensors holds integers"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    exports: Any, method: dict[str, Any], search: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(exports, method, **search)
