"""The model card: a header that the hub can read, true numbers, names that cannot break out."""

import json
from typing import get_args

import pandas as pd
import pytest
import yaml
from finished_run import (
    FINGERPRINT,
    LAYERS,
    SEARCH,
    make_results,
    provenance,
    tiny_model,
    write_configuration,
    write_model,
    write_tokens,
)
from huggingface_hub import ModelCardData
from report_page import measure_in_runtime

from evopress.artifacts.exports import file_digests, write_export_manifest
from evopress.artifacts.model_facts import model_facts, read_card
from evopress.artifacts.paths import GGUF, HUGGINGFACE
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import CONFIGURATION, PERPLEXITY, VARIANTS, read_table, write_table
from evopress.compression.size import compressed_size, dense_size
from evopress.config.context import StageContext
from evopress.config.evaluation import CardFacts
from evopress.export.card import _chosen_by, levels_table, write_card
from evopress.export.card_sections import escape, markdown_table
from evopress.export.exporters.compressed_tensors import CompressedTensors
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.folder import companion_files
from evopress.models.checkpoint import Checkpoint
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.scores import BlockScores
from evopress.util.errors import ArtifactError


@pytest.fixture
def results(tmp_path):
    results = make_results(tmp_path)
    write_configuration(results, "evo")
    write_table(
        pd.DataFrame(columns=VARIANTS.names),
        results.variant_table("gptq", 0),
        VARIANTS,
        provenance({"method": "gptq", "group_size": 64}),
    )
    folder = results.export("evo", HUGGINGFACE)
    folder.mkdir(parents=True)
    write_export_manifest(results, "evo", HUGGINGFACE, file_digests(folder), Provenance("export", "{}", FINGERPRINT))
    return results


def _measure(results, search, perplexity, kl):
    frame = pd.DataFrame([(search, "novels|x", perplexity, kl, 0.01, 0.875, 0.02, 1234)], columns=PERPLEXITY.names)
    write_table(frame, results.perplexity(search), PERPLEXITY, provenance())


def _header(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text[4:].split("\n---\n", 1)[0])


@pytest.mark.parametrize(("polish", "told"), [("none", False), ("sequential", True), ("asymmetric", True)])
def test_a_polished_model_says_so(results, polish, told):
    made = Provenance("export", json.dumps({"polish": polish}), FINGERPRINT)
    write_export_manifest(results, "evo", HUGGINGFACE, {}, made)
    write_card(StageContext(results), "evo", HuggingFace())
    text = results.card("evo", HUGGINGFACE).read_text()
    assert ("The model was polished" in text) == told
    assert ("2504.02692" in text) == (polish == "asymmetric")
    assert f"polish: {polish}" in text


def test_header_names_the_original_and_inherits_its_license(results):
    (results.model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [x]\n---\n# Tiny\n")
    write_card(StageContext(results), "evo", HuggingFace())
    assert _header(results.card("evo", HUGGINGFACE).read_text()) == {
        "base_model": "someone/tiny-llama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["evopress", "compressed"],
    }


def test_who_compressed_the_model_is_told_where_the_settings_say_so(results):
    write_card(StageContext(results), "evo", HuggingFace(), CardFacts(quantized_by="someone"))
    assert _header(results.card("evo", HUGGINGFACE).read_text())["quantized_by"] == "someone"


def test_the_card_of_a_file_has_all_that_the_hub_reads_and_the_size_of_each_file(results):
    (results.model / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlanguage: [en, de]\n---\n")
    folder = results.export("evo", GGUF)
    folder.mkdir()
    (folder / "evo.gguf").write_bytes(b"b" * 12_000)
    (folder / "LICENSE").write_bytes(b"t" * 3_000)
    write_export_manifest(results, "evo", GGUF, file_digests(folder), Provenance("export", "{}", FINGERPRINT))
    write_card(StageContext(results), "evo", GgufFile(), CardFacts(quantized_by="someone"))
    text = results.card("evo", GGUF).read_text()
    assert _header(text) == {
        "base_model": "someone/tiny-llama",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "gguf",
        "license": "other",
        "license_name": "ours",
        "pipeline_tag": "text-generation",
        "quantized_by": "someone",
        "tags": ["evopress", "compressed"],
    }
    assert ModelCardData(**_header(text)).to_dict() == _header(text), "the hub's own reader sees something else"
    assert "| file | size |\n| --- | --- |\n| evo.gguf | 0.012 MB |\n| LICENSE | 0.003 MB |\n" in text
    assert "llama-cli -m" in text


def test_a_model_that_is_not_from_the_hub_claims_no_base_model(results):
    write_model(results, tiny_model(), {"source": "gguf", "path": "/models/tiny.Q4.gguf"})
    write_card(StageContext(results), "evo", HuggingFace())
    text = results.card("evo", HUGGINGFACE).read_text()
    assert "base_model" not in _header(text) and "license" not in _header(text)
    assert "# tiny.Q4 at " in text


def test_a_gguf_file_names_the_model_that_it_was_made_of(results):
    write_model(results, tiny_model(), {"source": "gguf", "path": "/models/tiny.Q4.gguf"})
    card = results.card("evo", HUGGINGFACE)
    for told in ({"base_model": "someone/tiny"}, {"base_model": "someone/tiny", "base_model_relation": "quantized"}):
        (results.model / "README.md").write_text(f"---\n{yaml.safe_dump(told)}---\n")
        write_card(StageContext(results), "evo", HuggingFace())
        assert {key: value for key, value in _header(card.read_text()).items() if "base" in key} == told
    write_card(StageContext(results), "evo", HuggingFace(), CardFacts(base_model="someone/else"))
    header = _header(card.read_text())
    assert (header["base_model"], header["base_model_relation"]) == ("someone/else", "quantized")


def test_measured_perplexity_is_told_once_it_is_there(results):
    write_card(StageContext(results), "evo", HuggingFace())
    assert "Not measured yet." in results.card("evo", HUGGINGFACE).read_text()
    _measure(results, "evo", 12.5, 0.25)
    _measure(results, "dense", 10.0, 0.0)
    write_card(StageContext(results), "evo", HuggingFace())
    text = results.card("evo", HUGGINGFACE).read_text()
    assert (
        "| novels\\|x | 10.0000 | 12.5000 | 0.25000 ±0.01000 | 0.8750 ±0.0200 | 1,234 |" in text
        and "Not measured" not in text
    )


def test_the_card_shows_a_small_picture_of_the_levels(results):
    write_card(StageContext(results), "evo", HuggingFace())
    assert "](levels.png)" in results.card("evo", HUGGINGFACE).read_text()
    picture = results.level_map("evo", HUGGINGFACE)
    assert picture.parent == results.card("evo", HUGGINGFACE).parent and picture.stat().st_size < 60_000
    assert "levels.png" not in map(str, companion_files(picture.parent))  # another export has its own


def test_a_file_that_was_measured_in_the_runtime_says_so(results):
    folder = results.export("evo", GGUF)
    folder.mkdir()
    (folder / "evo.gguf").write_bytes(b"blocks")
    files = file_digests(folder)
    write_export_manifest(results, "evo", GGUF, files, Provenance("export", "{}", FINGERPRINT))
    write_card(StageContext(results), "evo", GgufFile())
    assert "## In llama.cpp" not in results.card("evo", GGUF).read_text()
    measure_in_runtime(results, "evo", 50.0, 1.5, files["evo.gguf"]["sha256"])
    for exporter in (HuggingFace(), GgufFile()):
        write_card(StageContext(results), "evo", exporter)
    assert "## In llama.cpp" not in results.card("evo", HUGGINGFACE).read_text()
    text = results.card("evo", GGUF).read_text()
    assert "| generation | 150.0 tokens/s, 1.50 times as fast |" in text
    assert "| novels | 12.5000 | 12.7500 | 0.00600 | 100 |" in text
    measure_in_runtime(results, "evo", 50.0, 1.5, "0" * 64)  # another file than the one that lies there
    write_card(StageContext(results), "evo", GgufFile())
    assert "## In llama.cpp" not in results.card("evo", GGUF).read_text()


def test_text_that_is_not_held_out_is_named(results):
    _measure(results, "evo", 12.5, 0.25)
    _measure(results, "dense", 10.0, 0.0)
    write_card(StageContext(results), "evo", HuggingFace())
    assert "## Held-out text" in results.card("evo", HUGGINGFACE).read_text()
    for dataset in ("search", "novels|x"):
        write_tokens(results, dataset, settings={"source": "hub", "id": "someone/novels"})
    write_card(StageContext(results), "evo", HuggingFace())
    text = results.card("evo", HUGGINGFACE).read_text()
    assert "## Held-out text" not in text and "## Perplexity, on text that is not all held out" in text
    assert "same text as data.search" in text.split("**Warning:**")[1].splitlines()[0]


def test_sizes_follow_from_the_configuration(results):
    configuration = write_configuration(results, "evo", level="4")
    checkpoint = Checkpoint(results.model)
    size, dense = compressed_size(checkpoint, configuration), dense_size(checkpoint, configuration)
    model = tiny_model()
    every = sum(parameter.numel() for parameter in model.parameters())
    searched = sum(model.get_parameter(f"{unit}.weight").numel() for unit in configuration["unit"])
    assert (dense.bits, dense.total_bytes) == (32, 4 * every)
    assert (size.bits, size.total_bytes) == (4, 4 * (every - searched) + searched // 2)
    assert repr(dense_size(checkpoint)) == repr(dense)  # NaN in it differs from itself


def test_budget_levels_settings_and_versions_are_in_the_card(results):
    write_card(StageContext(results), "evo", HuggingFace())
    text = results.card("evo", HUGGINGFACE).read_text()
    assert "| bits per weight asked (compressed layers) | 3 |" in text
    assert "strategy: evolution" in text and "group_size: 64" in text and "transformers 5" in text


def test_a_file_of_a_size_says_what_was_asked_and_what_it_takes(results):
    target = {"bytes": 30_000, "fraction": None, "bpw": None, "above_source": False}
    table = read_table(results.configuration("evo"), CONFIGURATION)
    folder = results.export("evo", GGUF)
    folder.mkdir()
    (folder / "evo.gguf").write_bytes(bytes(29_960))
    write_export_manifest(results, "evo", GGUF, file_digests(folder), Provenance("export", "{}", FINGERPRINT))
    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    for file, asked in (({"exporter": "gguf"}, "size asked of the export gguf"), (None, "packed size asked")):
        settings = provenance(SEARCH | {"target": target | {"file": file}})
        write_table(table, results.configuration("evo"), CONFIGURATION, settings)
        write_card(StageContext(results), "evo", GgufFile())
        text = results.card("evo", GGUF).read_text()
        assert f"| {asked} | 0.03 MB |" in text and "bits per weight asked" not in text
        assert "| weight files in this folder | 0.03 MB |" in text
        assert f"| the same in bits per parameter of the original | {8 * 29_960 / parameters:.4g} |" in text


def test_a_folder_of_packed_weights_tells_their_size_and_one_beside_it_does_not_deny_it(results):
    folder = results.export("evo", "compressed_tensors")
    folder.mkdir()
    for name, size in (("model-1.safetensors", 1_000_000), ("model-2.safetensors", 500_000), ("config.json", 9)):
        (folder / name).write_bytes(bytes(size))
    made = Provenance("export", "{}", FINGERPRINT)
    write_export_manifest(results, "evo", "compressed_tensors", file_digests(folder), made)
    write_card(StageContext(results), "evo", CompressedTensors())
    text = results.card("evo", "compressed_tensors").read_text()
    assert "| weight files in this folder | 1.5 MB |" in text
    write_card(StageContext(results), "evo", HuggingFace())
    text = results.card("evo", HUGGINGFACE).read_text()
    assert "no packed folder" not in text and "weight files in this folder" not in text  # the folder is empty here


def test_levels_table_has_a_row_a_block_in_the_layers_own_order(results):
    table = levels_table(write_configuration(results, "evo")).splitlines()
    assert table[0] == "| block | " + " | ".join(LAYERS) + " |"
    assert table[2] == "| 0 | 2 | 3 | 4 | 2 | 3 | 4 | 2 |"
    assert table[3] == "| 1 | 3 | 4 | 2 | 3 | 4 | 2 | 3 |"


def test_markdown_cannot_be_broken_by_names():
    hostile = "a|b\n---\n<script>*x* `y` [z](http://x)"
    cell = escape(hostile)
    assert "\n" not in cell and "\\|" in cell and "\\<script\\>" in cell and "\\[z\\]" in cell
    assert markdown_table(["a|b"], [["c|d"]]) == "| a\\|b |\n| --- |\n| c\\|d |"


def test_hostile_origin_stays_inside_the_header(results):
    evil = "x\n---\nlicense: mit"
    write_model(results, tiny_model(), {"source": "hub", "id": evil, "revision": "main"})
    write_card(StageContext(results), "evo", HuggingFace())
    header = _header(results.card("evo", HUGGINGFACE).read_text())
    assert header["base_model"] == evil and "license" not in header


def test_only_the_card_and_its_picture_are_written(results):
    before = {path: path.stat().st_mtime_ns for path in results.root.rglob("*") if path.is_file()}
    write_card(StageContext(results), "evo", HuggingFace())
    after = {path: path.stat().st_mtime_ns for path in results.root.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {results.card("evo", HUGGINGFACE), results.level_map("evo", HUGGINGFACE)}
    assert all(after[path] == before[path] for path in before)


def test_a_card_needs_an_export_of_this_model(results):
    results.model_manifest.write_text(json.dumps({"fingerprint": "e" * 64}))
    with pytest.raises(ArtifactError, match="was made for another model"):
        write_card(StageContext(results), "evo", HuggingFace())


@pytest.mark.parametrize(
    "text", ["no header", "---\n: [\n---\n", "---\n- a\n---\n", "---\n!!python/object:os.x {}\n---\n"]
)
def test_an_unreadable_card_of_the_original_is_passed_over(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path / "README.md") == {}


def test_facts_of_every_kind_of_source():
    assert (
        model_facts({"source": "hub", "id": "a/b", "revision": "main", "commit": "c0ffee"}, {}).origin
        == "a/b at c0ffee"
    )
    wheel = {"source": "pypi", "package": "llm-x", "version": "1.0", "file": "llm_x/X.Q4.gguf"}
    assert model_facts(wheel, {}).name == "X.Q4" and model_facts(wheel, {}).hub_id is None
    assert model_facts({"source": "folder", "path": "/models/tiny"}, {}).name == "tiny"


def chosen_by(**settings: object) -> str:
    return _chosen_by({"variants": "v", "target": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "random"}, "the best of random draws"),
        ({"strategy": "greedy"}, "greedy descent"),
        ({"strategy": "dp", "errors": "table"}, "the layers' own output errors"),
        ({"strategy": "dp", "errors": "propagated"}, "last hidden states"),
        ({"strategy": "scores", "score": "norm_ratio"}, "[weight subcloning](https://arxiv.org/abs/2312.09299)"),
        ({"strategy": "brute"}, "all possible choices"),
        ({"strategy": "imported", "file": "levels.txt"}, "read from a text file"),
        ({"strategy": "new"}, "found by the strategy new"),
    ],
)
def test_the_card_says_how_each_strategy_chose(settings, words):
    assert words in chosen_by(**settings)


def test_every_score_and_error_has_words_of_its_own():
    scores = get_args(BlockScores.model_fields["score"].annotation)
    errors = get_args(DynamicProgramming.model_fields["errors"].annotation)
    told = {chosen_by(strategy="scores", score=score) for score in scores}
    told |= {chosen_by(strategy="dp", errors=error) for error in errors}
    assert len(told) == len(scores) + len(errors)
