"""Units, groups and exact budgets."""

import pandas as pd
import pytest

from evopress.artifacts.tables import VARIANTS
from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS, SPARSITY
from evopress.search.space import make_space
from evopress.util.errors import ConfigError

SIZES = {"self_attn.q_proj": 64, "self_attn.k_proj": 16, "mlp.up_proj": 64}


def variants(bits=(2, 3, 4), blocks=2) -> pd.DataFrame:
    rows = [
        {
            "block": block,
            "layer": layer,
            "name": f"model.layers.{block}.{layer}",
            "level": str(b),
            "value": float(b),
            "cost": b * size,
            "parameters": size,
            "bits_per_weight": b + 0.5,
            "bytes": b * size // 8 + 4,
            "error": 0.1 / b,
            "damping": 0.01,
            "format": "test",
        }
        for block in range(blocks)
        for layer, size in SIZES.items()
        for b in bits
    ]
    return pd.DataFrame(rows, columns=VARIANTS.names)


def unit(parameters: int, bits: tuple[int, ...], group: str = "all") -> Unit:
    levels = tuple(Level(str(b), float(b), b * parameters, b * parameters // 8) for b in bits)
    return Unit(f"u{parameters}.{bits}", 0, "layer", group, parameters, levels)


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("size", {"64": 4, "16": 2}),
        ("name", {"q_proj": 2, "k_proj": 2, "up_proj": 2}),
        ("none", {"all": 6}),
    ],
)
def test_groups_follow_the_rule(rule, groups):
    space = make_space(BITS, BITS.units(variants(), rule), 3, "searches.q3")
    assert {name: len(members) for name, members in zip(space.groups, space.members, strict=True)} == groups


def test_units_are_ordered_by_block_with_levels_by_cost():
    shuffled = variants().sample(frac=1, random_state=0)
    units = BITS.units(shuffled, "size")
    assert [u.block for u in units] == [0, 0, 0, 1, 1, 1]
    assert all([level.label for level in u.levels] == ["2", "3", "4"] for u in units)
    assert units[0].levels[1].cost == 3 * units[0].parameters


def test_budget_is_the_exact_floor_of_the_decimal_target():
    # 2.3 as a binary float is a little less than 2.3, which would lose one bit here.
    assert BITS.budget(2.3, 10) == 23
    assert BITS.budget(2.999, 1_000_000_007) == 2_999_000_020


def test_group_budgets_sum_to_the_budget_at_most():
    space = make_space(BITS, BITS.units(variants(), "size"), 2.7, "searches.q")
    assert space.budget <= BITS.budget(2.7, 2 * sum(SIZES.values()))
    assert space.budget >= BITS.budget(2.7, 2 * sum(SIZES.values())) - len(space.groups)


def test_a_group_without_choice_leaves_its_excess_to_be_saved_by_the_others():
    units = [unit(10, (8,), "fixed"), unit(100, (2, 3, 4), "free"), unit(100, (2, 3, 4), "free")]
    space = make_space(BITS, units, 3, "searches.q")
    assert space.group_budgets == (80, 630 - 80)
    units = [unit(10, (2,), "fixed"), unit(100, (2, 3, 4), "free")]
    assert make_space(BITS, units, 3, "searches.q").group_budgets == (20, 310)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1.5, "searches.q3.target: 1.5 bits is below the lowest level (2)"),
        (4.5, "searches.q3.target: 4.5 bits is above the highest level (4)"),
    ],
)
def test_a_target_outside_of_the_levels_is_refused(target, message):
    with pytest.raises(ConfigError) as error:
        make_space(BITS, BITS.units(variants(), "size"), target, "searches.q3")
    assert str(error.value) == message


def test_a_target_that_fixed_units_put_out_of_reach_names_the_average():
    with pytest.raises(ConfigError, match=r"below the lowest average that the levels of these layers allow \(5\)"):
        make_space(BITS, [unit(10, (8,)), unit(10, (2, 3))], 3, "searches.q")


def test_the_ends_of_the_range_are_allowed():
    for target in (2, 4):
        space = make_space(BITS, BITS.units(variants(), "name"), target, "searches.q")
        assert space.budget == target * 2 * sum(SIZES.values())


def test_no_units_is_an_error():
    with pytest.raises(ConfigError, match="holds no layer"):
        make_space(BITS, [], 3, "searches.q")


def test_the_only_level_of_each_layer_meets_the_sparsity_that_it_rounds_up():
    units = [Unit(f"u{n}", n, (), "all", 12, (Level("0", 0.6, 4, 4),)) for n in range(3)]  # 7.2 of 12 weights go: 8 do
    assert make_space(SPARSITY, units, 0.6, "searches.q").group_budgets == (12,)
    with pytest.raises(ConfigError, match=r"0.58 sparsity is below the lowest level \(0.6\)"):
        make_space(SPARSITY, units, 0.58, "searches.q")
