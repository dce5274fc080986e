"""The ready configurations of the paper's models, against numbers that are worked out by hand."""

import math
from dataclasses import dataclass

import pandas as pd
import pytest
from paper_models import FAST, MODELS, PAPER, families, paper_settings, write_model_config

from evopress.artifacts.paths import Run
from evopress.config.model import HubModel
from evopress.plan.shape import ModelShape, shape_of
from evopress.plan.text import plan
from evopress.search.offered import Constraints
from evopress.search.problem import problem_of
from evopress.search.space import Space
from evopress.search.strategies.evolution import Evolution
from evopress.workflow.settings import Settings, combined, load_settings, read_yaml

LLAMA_3_BLOCK = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "phi-3-medium": 13_960_238_080,
}
"""As published with the models."""
BLOCK = {
    "llama-2-7b": 4 * 4096 * 4096 + 3 * 4096 * 11008,
    "llama-3-8b": LLAMA_3_BLOCK,
    "llama-3.1-8b": LLAMA_3_BLOCK,
    "mistral-7b-v0.3": LLAMA_3_BLOCK,
    "phi-3-medium": 5120 * (5120 + 2 * 1280) + 5120 * 5120 + 5120 * 2 * 17920 + 17920 * 5120,
}
"""Weights of the linear layers of a block."""
GENERATIONS = {
    32: {"drop4": 74, "drop8": 128, "drop12": 160, "drop16": 170},
    40: {"drop5": 116, "drop10": 200, "drop15": 250, "drop20": 266},
}
"""k (n - k) / 1.5, rounded down."""


@dataclass(frozen=True)
class Planned:
    """A model with all families."""

    name: str
    settings: Settings
    shape: ModelShape

    @property
    def blocks(self) -> int:
        return MODELS[self.name]["num_hidden_layers"]

    @property
    def linear(self) -> int:
        return BLOCK[self.name] * self.blocks

    def table(self, variants: str) -> pd.DataFrame:
        shape = self.shape
        return self.settings.variants[variants].table(shape.layers, shape.itemsize, f"variants.{variants}")


def space_of(table: pd.DataFrame, target: float, group_rule: str, where: str) -> Space:
    return problem_of({"v": table}, Constraints(where, target, group_rule)).space


@pytest.fixture(scope="module", params=MODELS)
def planned(request, tmp_path_factory) -> Planned:
    folder = write_model_config(tmp_path_factory.mktemp("paper") / "model", request.param)
    settings = Settings.load(paper_settings(request.param, folder))
    shape = shape_of(settings.model, Run(folder / "none"))
    assert shape is not None
    return Planned(request.param, settings, shape)


def test_each_model_is_one_that_the_hub_has_and_writes_to_a_folder_of_its_own():
    files = sorted(PAPER.glob("*.yaml"))
    assert {path.stem for path in files} == set(MODELS) | {
        path.stem for name in MODELS for path in (*families(name), *FAST.values())
    }
    for name in MODELS:
        settings = load_settings([PAPER / f"{name}.yaml"])
        assert isinstance(settings.model, HubModel) and settings.name == name
        assert settings.data.calibration.tokens == 2**23 and settings.data.search.tokens == 2**19
        length = 4096 if name == "llama-2-7b" else 8192
        texts = [settings.data.calibration, *settings.data.evaluation.values()]
        assert {text.sequence_length for text in texts} == {length}
        assert settings.data.search.sequence_length == 2048  # 256 minibatches of the first step's tokens
        assert {text.bos for text in [*texts, settings.data.search]} == {"none"}
        assert length <= MODELS[name]["max_position_embeddings"]
        assert list(settings.data.evaluation) == ["wikitext2", "c4", "fineweb_edu"]


def test_shapes_are_those_of_the_models(planned):
    shape = planned.shape
    assert shape.inside + shape.outside == PARAMETERS[planned.name]
    assert len(shape.blocks) == planned.blocks and shape.layers["parameters"].sum() == planned.linear
    assert len(shape.layers) == planned.blocks * (4 if planned.name == "phi-3-medium" else 7)


def test_three_bits_are_the_budget_of_quantization(planned):
    table = planned.table("gptq")
    space = space_of(table, 3.0, "size", "searches.q3-evopress")
    assert space.budget == 3 * planned.linear
    assert len(space.groups) == planned.shape.layers["parameters"].nunique()
    three = table[table["level"] == "3"]
    # 3 bits a weight; a scale of 16 bits and a zero of 3 bits for each 128 of them.
    assert three["bytes"].sum() == planned.linear * 3 // 8 + planned.linear // 128 * (16 + 3) // 8
    assert sorted(table["level"].unique()) == ["2", "3", "4", "5", "6"]


@pytest.mark.parametrize("percent", [50, 60, 70])
def test_half_to_seven_tenths_of_the_weights_go(planned, percent):
    table = planned.table(f"sparse{percent}")
    space = space_of(table, percent / 100, "none", f"searches.s{percent}-evopress")
    assert space.budget == planned.linear * (100 - percent) // 100 and space.groups == ("all",)
    assert space.fits(space.top * 0)
    for layer, rows in table[table["block"] == 0].groupby("layer"):
        weights = int(rows["parameters"].iloc[0])
        centre = -(-weights * percent // 100)
        each_way = [min(8, centre // 10**6), min(8, math.ceil((weights - centre) / 10**6) - 1)]
        assert len(rows) == sum(each_way) + 1, layer
        assert sorted(rows["cost"]) == sorted(
            weights - centre - steps * 10**6 for steps in range(-each_way[0], each_way[1] + 1)
        )


def test_small_layers_have_few_levels(planned):
    """4,194,304 weights of a key projection at 50 %: 2,097,152 go, so there is room for two steps each way."""
    if planned.name in ("llama-3-8b", "llama-3.1-8b", "mistral-7b-v0.3"):
        table = planned.table("sparse50").query("block == 0 and layer == 'self_attn.k_proj'")
        assert table["level"].tolist() == ["-2", "-1", "0", "+1", "+2"]
        assert table["cost"].tolist() == [4_097_152, 3_097_152, 2_097_152, 1_097_152, 97_152]


def test_depth_searches_run_as_long_as_their_size_asks(planned):
    found = {}
    for name, search in planned.settings.searches.items():
        if search.variants == "modules":
            space = space_of(planned.table("modules"), search.target, "size", f"searches.{name}")
            kept = planned.blocks - round(search.target)
            assert dict(zip(space.groups, space.group_budgets, strict=True)) == {"attn": kept, "mlp": kept}
            assert isinstance(search, Evolution)
            assert (search.offspring, search.survivors, search.tokens) == (32, (2, 1), (2048, 32768))
            assert (search.initial_candidates, search.initial_tokens) == (64, 2048)
            found[name.removesuffix("-evopress")] = search.generations
            blocks = space_of(planned.table("blocks"), search.target, "size", "searches.x")
            assert blocks.group_budgets == (kept,)
    assert found == GENERATIONS[planned.blocks]


def test_evolution_has_the_settings_of_the_paper(planned):
    evolution = {name: s for name, s in planned.settings.searches.items() if isinstance(s, Evolution)}
    for name, search in evolution.items():
        if name.startswith("q"):
            expected = (150, 128, (16, 4, 1), (2048, 16384, 131072), "size")
        elif name.startswith("s"):
            expected = (400, 64, (8, 2, 1), (2048, 16384, 65536), "none")
        else:
            continue
        asked = (search.generations, search.offspring, search.survivors, search.tokens, search.group_rule)
        assert asked == expected and search.fitness == "kl" and search.start == "uniform"
    assert len(evolution) == 8


def test_fast_searches_stand_beside_those_of_their_family_and_judge_a_fraction(tmp_path):
    folder, name = write_model_config(tmp_path / "model", "llama-3.1-8b"), "llama-3.1-8b"
    usual = paper_settings(name, folder)["searches"]
    values = combined([paper_settings(name, folder), *map(read_yaml, FAST.values())])
    searches = Settings.load(values).searches
    fast = {name: searches[name] for name in set(searches) - set(usual)}
    assert set(fast) == {"q3-fast", "s50-fast", "s60-fast", "s70-fast"}
    for name, search in fast.items():
        slow = searches[name.replace("fast", "evopress")]
        assert isinstance(search, Evolution) and isinstance(slow, Evolution)
        assert (search.generations, search.offspring, search.survivors, search.tokens) == (400, 16, (1, 1), (512, 8192))
        assert (search.target, search.variants, search.group_rule) == (slow.target, slow.variants, slow.group_rule)


def test_the_whole_of_it_can_be_planned(planned, tmp_path):
    text = plan(planned.settings, Run(tmp_path))
    for name in planned.settings.searches:
        assert f"search {name} " in text
    judged = 128 * 2048 + 16 * 16384 + 5 * 131072
    assert f"{judged * 150 / 1e6:.0f} M" in text
