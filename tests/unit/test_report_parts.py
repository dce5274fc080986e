"""Parts of the report: maps with one scale, accepted moves, costs beside the plan, digests, and its one script."""

import base64
import hashlib
import json
import re

import numpy as np
import pandas as pd
import pytest
from finished_run import (
    BLOCKS,
    FINGERPRINT,
    LAYERS,
    SEARCH,
    make_results,
    provenance,
    write_configuration,
    write_tokens,
)
from report_page import Page, measure, progress, write_way

from evopress.artifacts.manifest import sha256
from evopress.artifacts.tables import CONFIGURATION, EFFECTS, VARIANTS, write_table
from evopress.config.context import StageContext
from evopress.export.level_map import GONE, LevelScale, level_png, level_svg
from evopress.plan.stages import Stage
from evopress.report.costs import HEAD, cost_rows
from evopress.report.maps import chosen_errors, effect_maps, effects_of, error_maps, level_maps
from evopress.report.page import write_report
from evopress.report.search_section import MOVES, moves
from evopress.util.errors import ArtifactError
from evopress.util.job_logs import Cost, cost_since, read_cost


@pytest.fixture
def run(tmp_path):
    run = make_results(tmp_path)
    write_tokens(run, "novels", settings={"source": "file", "seed": 7})
    for search, level in (("uniform", "3"), ("evo", None)):
        write_configuration(run, search, level=level)
        write_way(run, search, evolved=level is None)
    for block in range(BLOCKS):
        rows = [_variant(block, layer, level) for layer in LAYERS for level in (2, 3, 4)]
        write_table(pd.DataFrame(rows), run.variant_table("gptq", block), VARIANTS, provenance())
    for model, kl in (("dense", 0.0), ("uniform", 0.5), ("evo", 0.25)):
        measure(run, model, 10 + kl, kl, 0.5)
    return run


def _variant(block, layer, level):
    known = {"block": block, "layer": layer, "name": f"model.layers.{block}.{layer}", "family": "bits", "format": "x"}
    numbers = {"level": str(level), "value": level, "error": (1 + block) / 10**level}
    return {**dict.fromkeys(VARIANTS.names, 0), **known, **numbers}


def test_a_colour_is_the_same_level_in_all_maps():
    few = pd.DataFrame({"value": [2.0, 4.0], "level": ["2", "4"]})
    many = pd.DataFrame({"value": [2.0, 3.0, 4.0, 4.0], "level": ["2", "3", "4", "4b"]})
    scale = LevelScale.of([few, many])
    assert [label for _, label in scale.legend] == ["2", "3", "4, 4b"]
    assert len(set(scale.colours.values())) == 3
    wide = LevelScale.of([pd.DataFrame({"value": np.arange(40.0), "level": list(map(str, range(40)))})])
    assert len(wide.legend) <= 12 and wide.legend[0][1] == "0"


def test_maps_of_searches_stand_side_by_side_with_one_legend(run):
    configurations = {search: write_configuration(run, search) for search in ("evo", "again")}
    (group,) = level_maps({**configurations, "flat": write_configuration(run, "flat", level="3")})
    assert [label for _, label in group.legend] == ["2", "3", "4"]
    assert [panel.svg is None for panel in group.panels] == [False, False, True]
    assert group.panels[2].text == "Every layer is at level 3."
    scale = LevelScale.of(configurations.values())
    for colour in scale.colours.values():
        assert all(colour in panel.svg for panel in group.panels[:2])
    assert len(set(re.findall(r">([a-z]+_proj)<", group.panels[0].svg))) == len(LAYERS)


def test_a_layer_without_a_level_stays_empty(run):
    table = write_configuration(run, "evo")
    whole, scale = level_svg(table, LevelScale.of([table]), "x"), LevelScale.of([table])
    part = level_svg(table[table.index != 3], scale, "x")
    assert part != whole and level_svg(table, scale, "x") == whole


def _with_outer(table):
    """The same configuration with an input embedding at level 4, and a head at level 2."""
    outer = table.iloc[:2].assign(unit=["model.embed_tokens", "lm_head"], block=[-1, BLOCKS])
    outer = outer.assign(layer=["embedding", "head"], level=["4", "2"], value=[4.0, 2.0])
    return pd.concat([outer.iloc[:1], table, outer.iloc[1:]], ignore_index=True)


def test_embedding_and_head_have_a_row_of_one_cell_each(run):
    table = write_configuration(run, "evo", level="3")
    scale = LevelScale.of([_with_outer(table)])
    inside, outside = (level_svg(each, scale, "x") for each in (table, _with_outer(table)))
    assert re.findall(r">(embedding|head|q_proj)<", outside) == ["embedding", "q_proj", "head"]
    assert re.findall(r">(embedding|head|q_proj)<", inside) == ["q_proj"]
    for level, colour in scale.colours.items():
        assert outside.count(colour) - inside.count(colour) == (level != 3.0)
    (group,) = level_maps({"evo": _with_outer(table)})
    assert [label for _, label in group.legend] == ["2", "3", "4"] and ">head<" in group.panels[0].svg
    assert level_png(_with_outer(table)) != level_png(table)


def test_errors_of_embedding_and_head_are_shown(run):
    table = _with_outer(write_configuration(run, "evo", level="3"))
    rows = [
        _variant(-1, "embedding", 4) | {"name": "model.embed_tokens", "error": 0.5},
        _variant(BLOCKS, "head", 2) | {"name": "lm_head", "error": 0.25},
    ]
    write_table(pd.DataFrame(rows), run.variant_table("gptq", "embedding"), VARIANTS, provenance())
    errors = chosen_errors(run, table).set_index("layer")["value"]
    assert (errors["embedding"], errors["head"]) == (0.5, 0.25) and len(errors) == len(LAYERS) * BLOCKS + 2
    (group,) = error_maps(run, {"evo": table})
    assert group.legend[-1][1] == "5.0e-01" and ">embedding<" in group.panels[0].svg


def test_the_picture_of_a_card_is_small_and_the_same_each_time(run):
    table = write_configuration(run, "evo")
    picture = level_png(table)
    assert picture.startswith(b"\x89PNG") and len(picture) < 60_000 and level_png(table) == picture


def test_errors_are_those_of_the_levels_that_were_chosen(run):
    table = write_configuration(run, "evo")
    errors = chosen_errors(run, table)
    expected = {(row.layer, row.block): (1 + row.block) / 10 ** int(row.level) for row in table.itertuples()}
    assert {(row.layer, row.block): row.value for row in errors.itertuples()} == pytest.approx(expected)
    (group,) = error_maps(run, {"evo": table})
    assert [group.legend[0][1], group.legend[-1][1]] == ["1.0e-04", "2.0e-02"]
    svg = group.panels[0].svg
    assert "<image" not in svg and "$" not in svg, "the page shows no pictures, and figures no formulas"
    run.variant_table("gptq", 0).unlink()
    assert set(chosen_errors(run, table)["block"]) == {1}
    run.variant_table("gptq", 1).unlink()
    assert error_maps(run, {"evo": table}) == []


def test_single_effects_have_a_map_where_they_were_measured(run):
    table = write_configuration(run, "evo")
    assert effect_maps(run, {"evo": table}) == effect_maps(run, {}) == []
    rows = [(unit, "3", 10.0 ** -(number % 4), 0.0) for number, unit in enumerate(table["unit"])]
    rows[0] = (rows[0][0], "3", -1e-6, 0.0)  # noise
    effects = pd.DataFrame(rows, columns=EFFECTS.names)
    settings = {**SEARCH, "start": "sensitivity"}
    name = effects_of(settings)
    for of, fingerprint in ((name, FINGERPRINT), ("gptq-1", "of an earlier model")):
        write_table(effects, run.effects(of), EFFECTS, provenance(fingerprint=fingerprint))
    assert effect_maps(run, {"evo": table}) == [], "the search did not ask for them"
    write_table(table, run.configuration("evo"), CONFIGURATION, provenance(settings))
    (group,) = effect_maps(run, {"evo": table})
    assert [panel.name for panel in group.panels] == [name]
    assert [group.legend[0][1], group.legend[-1][1]] == ["1.0e-03", "1.0e+00"]
    write_table(effects, run.effects(name), EFFECTS, provenance(fingerprint="another"))
    with pytest.raises(ArtifactError, match="another model"):
        effect_maps(run, {"evo": table})


def test_effects_of_layers_that_share_a_level_are_shown_by_the_first(run):
    table, settings = write_configuration(run, "evo"), {**SEARCH, "start": "sensitivity"}
    write_table(table, run.configuration("evo"), CONFIGURATION, provenance(settings))
    unit = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    effects = pd.DataFrame([(unit, "3", 0.5, 0.0)], columns=EFFECTS.names)
    write_table(effects, run.effects(effects_of(settings)), EFFECTS, provenance())
    (group,) = effect_maps(run, {"evo": table})
    assert group.legend[0][1] == group.legend[-1][1] == "5.0e-01"


def test_a_layer_of_a_dropped_module_is_grey(run):
    table = write_configuration(run, "evo").assign(value=lambda frame: frame["value"].where(frame.index != 3))
    table.loc[3, "level"] = "drop"
    scale = LevelScale.of([table])
    assert scale.legend[-1] == (GONE, "dropped") and "drop" not in scale.labels.values()
    assert GONE in level_svg(table, scale, "x")


def test_moves_are_counted_by_kind_of_layer():
    assert moves(progress()) == [MOVES, ["k_proj", "0", "2"], ["q_proj", "2", "0"], ["v_proj", "0", "1"]]
    assert moves(progress()[:2]) == []


def test_a_cost_is_read_as_it_was_told(tmp_path):
    log = tmp_path / "x.log"
    for cost in (Cost(3.0, 0.5), Cost(12.3, 1.25, 0.75)):
        with log.open("a") as stream:
            stream.write(f"2026-01-01 INFO {cost}\n")
        assert read_cost(log) == cost
    log.write_text("nothing\n")
    assert read_cost(log) is None
    own = cost_since(0.0)
    assert own.seconds > 0 and 0.05 < own.memory_gb < 1000 and own.device_gb == 0


def test_costs_are_summed_by_stage_beside_the_plan(run):
    logs = {
        "variants/gptq/block_000": Cost(2.0, 0.5),
        "variants/gptq/block_001": Cost(3.0, 0.75),
        "variants/gptq/block_embedding": Cost(4.0, 0.5),
        "search/evo": Cost(5.0, 0.5, 0.25),
        "search/gone": Cost(9.0, 9.0),
        "variants/gone/block_000": Cost(9.0, 9.0),
        "effects/gptq-gone": Cost(9.0, 9.0),
        "export/evo_gguf": Cost(2.0, 0.1),
        "export/evo_gone_gguf": Cost(9.0, 9.0),
        "evaluation/gone/perplexity": Cost(9.0, 9.0),
        "card/gone_gguf": Cost(9.0, 9.0),
        "evaluation/evo/perplexity": Cost(1.0, 0.1),
        "model": Cost(1.0, 0.1),
        "report": Cost(1.0, 0.1),
    }
    assert cost_rows(run, ["evo"]) == []
    for name, cost in logs.items():
        path = run.root / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{cost}\n")
    planned = [Stage("variants gptq", 2, memory=6e8, work={"variants": 2.5e9})]
    assert cost_rows(run, ["evo"], planned) == [
        HEAD,
        ["model", "1", "1.0", "1.0", "0.10", "-", "-"],
        ["variants gptq", "2", "5.0", "3.0", "0.75", "0.60", "2.50 G"],
        ["variants gptq, embedding", "1", "4.0", "4.0", "0.50", "-", "-"],
        ["search evo", "1", "5.0", "5.0", "0.75", "-", "-"],
        ["export", "1", "2.0", "2.0", "0.10", "-", "-"],
        ["perplexity", "1", "1.0", "1.0", "0.10", "-", "-"],
    ]


def test_the_page_runs_its_own_script_only(run):
    write_report(StageContext(run), ["uniform", "evo"])
    text = run.report.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in text
    assert "fetch" not in script and "http" not in script


def test_the_page_says_how_to_make_the_run_again(run):
    write_report(StageContext(run), ["uniform", "evo"])
    rows = Page(run.report.read_text()).rows
    assert ["text novels", "7", sha256(run.tokens("novels"))] in rows
    assert ["levels of evo", "-", sha256(run.configuration("evo"))] in rows
    assert "settings.yaml" not in run.report.read_text()
    config = {"name": "mine", "searches": {"evo": {"target": 3}}}
    write_report(StageContext(run), ["uniform", "evo"], config=json.dumps(config))
    text = run.report.read_text()
    assert "complete: true\nname: mine" in text and "--configfile settings.yaml" in text
