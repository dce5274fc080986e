"""`import-config` and `export-config`: all families through text and back, and what they refuse."""

from pathlib import Path

import pytest
import yaml
from finished_run import make_results, provenance, tiny_model, write_configuration
from paper_models import PAPER, write_model_config

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, LAYERS, write_table
from evopress.cli.commands import main
from evopress.compression.families import MODULES
from evopress.compression.methods.drop import Drop
from evopress.models.structure import layer_table
from evopress.search.configuration import Configuration, parse_candidate, require_budget
from evopress.search.problem import SearchProblem
from evopress.search.space import make_space
from evopress.search.strategies.imported import Imported
from evopress.util.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


@pytest.fixture
def overlays(tmp_path, monkeypatch) -> list[str]:
    """Settings of Llama-2-7B in all families, its config in a folder."""
    monkeypatch.chdir(REPOSITORY)
    folder = write_model_config(tmp_path / "model", "llama-2-7b")
    local = tmp_path / "local.yaml"
    local.write_text(yaml.safe_dump({"model": {"source": "folder", "path": str(folder)}}))
    names = ("llama-2-7b", "quantization", "sparsity", "depth-32-blocks")
    return [*(str(PAPER / f"{name}.yaml") for name in names), str(local)]


def levels(changes: dict[str, str], default: str) -> str:
    names = [f"model.layers.{block}.{kind}" for block in range(32) for kind in KINDS]
    return "".join(f"{name}: {changes.get(name, default)}\n" for name in names)


def blocks(*words: str) -> str:
    return "".join(f"{word}\n" for word in (*words, *["none"] * (32 - len(words))))


UP, DOWN = "model.layers.3.self_attn.q_proj", "model.layers.4.self_attn.q_proj"
TEXTS = {
    "q3-evopress": (levels({UP: "4", DOWN: "2"}, "3"), ["3 bits per weight on average", "2: 1, 3: 222, 4: 1"]),
    "s50-evopress": (levels({UP: "-3", DOWN: "3"}, "0"), ["0.5 of the weights zero", "-3: 1, 0: 222, +3: 1"]),
    "drop4-evopress": (
        blocks("attn", "attn+mlp", "mlp", "attn+mlp", "attn+mlp"),
        ["4 attention and 4 MLP", "3 blocks"],
    ),
    "drop4-shortgpt": (blocks(*["attn+mlp"] * 4), ["4 attention and 4 MLP modules dropped, 4 blocks whole (target 4)"]),
}


@pytest.mark.parametrize("search", TEXTS)
def test_a_file_of_each_family_is_described_and_becomes_settings(search, overlays, tmp_path, capsys):
    text, facts = TEXTS[search]
    path = tmp_path / "file.txt"
    path.write_text(text)
    assert main(["import-config", str(path), search, *overlays]) == 0
    printed = capsys.readouterr().out
    assert all(fact in printed for fact in facts), printed
    section = yaml.safe_load(printed)["searches"][search]
    assert Imported.model_validate(section).file == str(path)


@pytest.mark.parametrize(
    ("search", "text", "message"),
    [
        ("q3-evopress", levels({UP: "4"}, "3"), "bits per weight above the target of 3 (16777216 bits in all)"),
        ("q3-evopress", levels({UP: "8"}, "3"), "line 22: model.layers.3.self_attn.q_proj has no level 8"),
        ("q3-evopress", blocks("attn"), "line 1: 'attn' says which modules a block loses"),
        ("q3-evopress", "transformer.h.0.attn: 3\n", "line 1: no searched layer is named 'transformer.h.0.attn'"),
        ("s50-evopress", levels({UP: "-1"}, "0"), "short of the target of 0.5 (1000000 weights too many stay)"),
        ("s50-evopress", levels({UP: "9"}, "0"), "has no level 9; there are"),
        ("drop4-evopress", blocks("attn+mlp"), "6 modules too many stay for the target of 4 blocks"),
        ("drop4-shortgpt", blocks("attn+mlp"), "6 modules too many stay for the target of 4 blocks"),
        ("drop4-shortgpt", blocks("attn"), "line 1: drops a part of model.layers.0, but 0.attn and 0.mlp stay or go"),
        ("drop4-evopress", "none\n" * 31, "line 31: is the last, but the model has 32 blocks"),
        ("drop4-evopress", "none\n" * 33, "line 33: is the last, but the model has 32 blocks"),
        ("drop4-evopress", levels({}, "3"), "this is the format of levels"),
        ("new", levels({}, "3"), "searches.new: is not in the settings; give --variants and --target"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(search, text, message, overlays, tmp_path, capsys):
    path = tmp_path / "file.txt"
    path.write_text(text)
    assert main(["import-config", str(path), search, *overlays]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and printed.err.startswith("error: searches.")


def test_a_search_that_is_not_in_the_settings_needs_variants_and_a_target(overlays, tmp_path, capsys):
    path, out = tmp_path / "file.txt", tmp_path / "new.yaml"
    path.write_text(levels({}, "3"))
    asked = ["import-config", str(path), "new", *overlays, "--variants", "gptq", "--target", "3", "--output", str(out)]
    assert main(asked) == 0
    assert yaml.safe_load(out.read_text())["searches"]["new"]["target"] == 3.0
    before = out.read_bytes()
    assert main(asked) == 1 and "is there already" in capsys.readouterr().err and out.read_bytes() == before
    assert main([*asked, "--force"]) == 0


def test_the_printed_settings_hold_with_the_others(overlays, tmp_path, capsys):
    path = tmp_path / "file.txt"
    path.write_text(levels({}, "3"))
    assert main(["import-config", str(path), "q3-evopress", *overlays]) == 0
    (tmp_path / "overlay.yaml").write_text(capsys.readouterr().out)
    assert main(["plan", *overlays, str(tmp_path / "overlay.yaml")]) == 0
    assert "search q3-evopress " in capsys.readouterr().out


# Export


def test_levels_are_exported_as_they_were_chosen(tmp_path, capsys):
    run = make_results(tmp_path)
    table = write_configuration(run, "q3")
    assert main(["export-config", str(run.root), "q3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{row.unit}: {row.level}" for row in table.itertuples()]


def test_an_export_replaces_no_file_unasked(tmp_path, capsys):
    run, out = make_results(tmp_path), tmp_path / "sub" / "q3.txt"
    write_configuration(run, "q3", "3")
    asked = ["export-config", str(run.root), "q3", "--output", str(out)]
    assert main(asked) == 0 and out.read_text().count(": 3\n") == 14
    out.write_text("mine")
    assert main(asked) == 1 and "is there already" in capsys.readouterr().err and out.read_text() == "mine"
    assert main([*asked, "--force"]) == 0 and out.read_text() != "mine"
    assert [path.name for path in out.parent.iterdir()] == ["q3.txt"]


def test_an_export_of_a_search_that_never_ran_is_an_error(tmp_path, capsys):
    run = make_results(tmp_path)
    assert main(["export-config", str(run.root), "none"]) == 1
    assert "configuration.parquet: missing" in capsys.readouterr().err


def depth_problem(run: Run, settings: Drop, target: float) -> SearchProblem:
    layers = layer_table(tiny_model())
    write_table(layers, run.layers, LAYERS, provenance())
    table = settings.table(layers, 4, "variants.depth")
    space = make_space(MODULES, MODULES.units(table, "none"), target, "searches.d")
    return SearchProblem(space, MODULES, "depth", "searches.d", modules=table)


@pytest.mark.parametrize("words", [("attn", "mlp"), ("mlp", "attn"), ("none", "attn+mlp"), ("attn+mlp", "none")])
def test_dropped_modules_survive_a_round_trip(words, tmp_path, capsys):
    run = make_results(tmp_path)
    problem = depth_problem(run, Drop(), 1)
    text = "".join(f"{word}\n" for word in words)
    candidate = parse_candidate(text, problem.space, 2, "where")
    require_budget(problem, candidate, 1, "where")
    made = Configuration.of_candidate(problem, candidate).table
    write_table(made, run.configuration("d"), CONFIGURATION, provenance())
    assert main(["export-config", str(run.root), "d"]) == 0
    assert capsys.readouterr().out == text


def test_excluded_modules_stay(tmp_path, capsys):
    run = make_results(tmp_path)
    problem = depth_problem(run, Drop(exclude=("*.0.attn",)), 1)
    with pytest.raises(ConfigError, match="where, line 1: the attn module of this block may not be dropped"):
        parse_candidate("attn\nmlp\n", problem.space, 2, "where")
    candidate = parse_candidate("mlp\nattn\n", problem.space, 2, "where")
    made = Configuration.of_candidate(problem, candidate).table
    write_table(made, run.configuration("d"), CONFIGURATION, provenance())
    assert main(["export-config", str(run.root), "d"]) == 0
    assert capsys.readouterr().out == "mlp\nattn\n"
