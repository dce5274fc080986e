"""Levels of a layer, settings that offer them, and search spaces over them."""

from itertools import pairwise

import pandas as pd
import pytest

from evopress.artifacts.tables import VARIANTS
from evopress.compression.families import SPARSITY
from evopress.compression.methods.pruning import Magnitude, SparseGpt
from evopress.compression.sparsity import pattern_levels, portions, removed_at, unstructured_levels
from evopress.config.base import parse_section
from evopress.search.candidates import uniform_of_size, uniform_start
from evopress.search.space import Space, make_space
from evopress.search.strategies.uniform import uniform_candidate
from evopress.util.errors import CompressionError, ConfigError
from evopress.workflow.settings import Settings


def test_a_step_is_the_same_number_of_weights_in_every_layer() -> None:
    for parameters in (331_776, 110_592, 884_737):
        levels = unstructured_levels(parameters, 0.5, 10_000, 8)
        removed = [level.removed for level in levels]
        assert {later - earlier for earlier, later in pairwise(removed)} == {10_000}
        assert dict(zip((level.label for level in levels), removed, strict=True))["0"] == -(-parameters // 2)


def test_levels_end_where_the_layer_does() -> None:
    # The key projection of the embedded model: 55,296 weights either way of the target.
    labels = [level.label for level in unstructured_levels(110_592, 0.5, 10_000, 8)]
    assert labels == ["-5", "-4", "-3", "-2", "-1", "0", "+1", "+2", "+3", "+4", "+5"]
    # Removing nothing is a level, keeping nothing is not.
    assert [level.removed for level in unstructured_levels(100, 0.5, 25, 8)] == [0, 25, 50, 75]


def test_a_layer_too_small_for_a_step_is_fixed_at_the_target() -> None:
    levels = unstructured_levels(9_000, 0.5, 10_000, 8)
    assert [(level.label, level.removed) for level in levels] == [("0", 4_500)]


def test_the_target_is_reached_exactly_as_written() -> None:
    assert removed_at(10, 0.3) == 3  # 0.3 as a binary float times 10 is more than 3
    assert removed_at(7, 0.5) == 4
    assert removed_at(1_000_000_007, 0.1) == 100_000_001


def test_a_level_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(CompressionError, match=r"0\.99 leaves nothing of a layer of 50 weights"):
        unstructured_levels(50, 0.99, 10, 2)


def test_patterns_remove_their_share_and_must_divide_the_inputs() -> None:
    levels = pattern_levels(960, 24, ["4:8", "1:4", "3:4"])
    assert [(level.label, level.removed, level.pattern) for level in levels] == [
        ("3:4", 240, (3, 4)),
        ("4:8", 480, (4, 8)),
        ("1:4", 720, (1, 4)),
    ]
    with pytest.raises(CompressionError, match="multiples of 8, but there are 20"):
        pattern_levels(400, 20, ["2:4", "4:8"])


def test_portions_are_even_and_exact() -> None:
    assert portions(10, [3, 3, 3, 1]) == [3, 3, 3, 1]
    for total in range(0, 41):
        shares = portions(total, [16, 16, 8])
        assert sum(shares) == total
        assert all(abs(share - total * part / 40) < 1 for share, part in zip(shares, [16, 16, 8], strict=True))


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5])
def test_sparsity_must_lie_between_0_and_1(sparsity: float) -> None:
    with pytest.raises(ConfigError, match=r"^variants\.s\.sparsity: "):
        parse_section(SparseGpt, {"sparsity": sparsity}, "variants.s")


@pytest.mark.parametrize("pattern", ["2", "4:4", "0:4", "a:b", "2:4:8"])
def test_a_pattern_keeps_some_and_drops_some(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^variants\.s\.patterns: .*is not a pattern n:m"):
        parse_section(Magnitude, {"patterns": [pattern]}, "variants.s")


def test_a_pattern_is_named_once() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        parse_section(Magnitude, {"patterns": ["2:4", "2:4"]}, "variants.s")


def run_settings(search: dict[str, object], variants: dict[str, object]) -> Settings:
    text = {"source": "python_docs", "tokens": 4096, "sequence_length": 512}
    return Settings.load(
        {
            "name": "run",
            "model": {"source": "folder", "path": "/nowhere"},
            "data": {"calibration": text, "search": text, "evaluation": {"held_out": text}},
            "variants": {"v": variants},
            "searches": {"s": {"variants": "v", **search}},
        }
    )


def test_the_method_decides_what_a_target_is() -> None:
    assert run_settings({"strategy": "owl", "target": 0.5}, {"method": "wanda"}).searches["s"].target == 0.5
    with pytest.raises(ConfigError, match=r"searches\.s\.target: 3 is no sparsity below 1"):
        run_settings({"strategy": "uniform", "target": 3}, {"method": "sparsegpt"})
    with pytest.raises(ConfigError, match=r"searches\.s\.strategy: owl cannot choose from 'v', whose levels are bits"):
        run_settings({"strategy": "owl", "target": 3}, {"method": "gptq"})


def table(sizes: dict[str, int], target: float = 0.5, step: int = 10, blocks: int = 2) -> pd.DataFrame:
    rows = [
        {
            "block": block,
            "layer": layer,
            "name": f"m.{block}.{layer}",
            "family": "sparsity",
            "level": level.label,
            "value": level.removed / parameters,
            "cost": parameters - level.removed,
            "parameters": parameters,
            "bits_per_weight": 9.0,
            "bytes": parameters,
            "error": 0.1,
            "damping": 0.0,
            "format": "bitmask",
        }
        for block in range(blocks)
        for layer, parameters in sizes.items()
        for level in unstructured_levels(parameters, target, step, 2)
    ]
    return pd.DataFrame(rows, columns=VARIANTS.names)


def space_of(variants: pd.DataFrame, target: float, rule: str = "none") -> Space:
    return make_space(SPARSITY, SPARSITY.units(variants, rule), target, "searches.s")


def test_a_uniform_choice_in_bytes_has_nearly_the_same_sparsity_everywhere() -> None:
    variants = table({"a": 1000, "b": 4000}, 0.7, step=100)
    variants["bytes"] = 2 * variants["cost"]
    units = SPARSITY.units(variants, "none")
    space = Space(units, (int(0.3 * 2 * variants.drop_duplicates("name")["parameters"].sum()),), in_bytes=True)
    chosen = uniform_of_size(space)
    sparsities = [unit.levels[level].value for unit, level in zip(units, chosen, strict=True)]
    assert space.fits(chosen) and max(sparsities) - min(sparsities) <= 100 / 1000


@pytest.mark.parametrize("rule", ["none", "size", "name"])
@pytest.mark.parametrize("target", [0.5, 0.55, 0.3])
def test_level_0_everywhere_meets_the_target_and_starts_the_search(rule: str, target: float) -> None:
    variants = table({"a": 333, "b": 101, "c": 77, "d": 9}, target)
    space = space_of(variants, target, rule)
    uniform = uniform_candidate(space, target, "searches.s.target")
    chosen = [unit.levels[index].label for unit, index in zip(space.units, uniform, strict=True)]
    assert chosen == ["0"] * 8
    assert space.fits(uniform)
    assert uniform_start(space).tolist() == uniform.tolist()
    total = 2 * (333 + 101 + 77 + 9)
    assert SPARSITY.average(space.cost_of(uniform), total) >= target


def test_the_budget_is_the_most_weights_that_reach_the_sparsity() -> None:
    assert SPARSITY.budget(0.3, 10) == 7
    assert SPARSITY.budget(0.5, 7) == 3
    space = space_of(table({"a": 100}), 0.45)
    assert space.budget == 110


def test_a_sparsity_out_of_reach_names_the_end_that_it_passes() -> None:
    variants = table({"a": 100})
    with pytest.raises(ConfigError, match=r"searches\.s\.target: 0\.8 sparsity is above the highest level \(0\.7\)"):
        space_of(variants, 0.8)
    with pytest.raises(ConfigError, match=r"searches\.s\.target: 0\.2 sparsity is below the lowest level \(0\.3\)"):
        space_of(variants, 0.2)


def test_uniform_offers_the_nearest_sparsities() -> None:
    space = space_of(table({"a": 100}), 0.45)
    with pytest.raises(ConfigError, match=r"0\.45 is not a level of m\.0\.a; the nearest are 0\.4 or 0\.5"):
        uniform_candidate(space, 0.45, "searches.s.target")
