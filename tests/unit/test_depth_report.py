"""What is told of a model without some of its modules: card, report, evaluation, archive."""

import json

import pandas as pd
import pytest
import torch
from architectures import build
from depth_run import without, write_depth_configuration, write_depth_model
from finished_run import provenance, write_tokens
from report_page import write_way
from torch import nn
from transformers import AutoModelForCausalLM

from evopress.artifacts.paths import HUGGINGFACE, Run
from evopress.artifacts.tables import PERPLEXITY, TASKS, read_table, write_table
from evopress.compression.families import BITS as BITS_FAMILY
from evopress.compression.size import compressed_size, dense_size, size_of
from evopress.config.context import ComputeSettings, StageContext
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.export.card import write_card
from evopress.export.exporters.archive import ARCHIVE, Archive, load_archive
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.models.checkpoint import Checkpoint
from evopress.report.comparison import BITS, DROPPED, PARAMETERS, SIZE, compare
from evopress.report.page import write_report

MIXED = {(0, "attn"), (1, "attn"), (1, "mlp"), (2, "mlp")}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    write_depth_model(run, build("llama"))
    write_depth_configuration(run, "evo", MIXED)
    run_export(StageContext(run), "evo", HuggingFace())
    return run


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_count_what_is_in_use(run):
    model, configuration = build("llama"), pd.read_parquet(run.configuration("evo"))
    size, checkpoint = size_of(run, configuration), Checkpoint(run.model)
    blocks = model.model.layers
    idle = _numbers(blocks[0].self_attn) + _numbers(blocks[1]) + _numbers(blocks[2].mlp)
    assert size.family is None and size.depth is not None
    assert (size.depth.parameters, size.depth.in_use) == (_numbers(model), _numbers(model) - idle)
    assert size.total_bytes == 4 * size.depth.in_use and size.bits == 32
    assert dense_size(checkpoint, configuration) == dense_size(checkpoint)
    with pytest.raises(ValueError, match="needs the table of layers"):
        compressed_size(checkpoint, configuration)


def test_layers_of_dropped_modules_take_no_packed_bytes(run):
    configuration, layers = pd.read_parquet(run.configuration("evo")), pd.read_parquet(run.layers)
    rows = [
        (
            row.name,
            row.block,
            row.layer,
            "gptq",
            "bits",
            "4",
            4.0,
            4 * row.parameters,
            row.parameters,
            row.parameters // 2,
        )
        for row in layers.itertuples(index=False)
    ]
    both = pd.concat([configuration, pd.DataFrame(rows, columns=configuration.columns)])
    size = compressed_size(Checkpoint(run.model), both, layers)
    assert (size.family, size.average, size.bits) == (BITS_FAMILY, 4, 4)
    kept = layers[[(row.block, row.module) not in MIXED for row in layers.itertuples()]]
    others = size.depth.in_use - int(kept["parameters"].sum())
    assert size.total_bytes == 4 * others + int(kept["parameters"].sum()) // 2


def test_the_card_says_what_is_gone_and_what_is_zeros(run):
    write_card(StageContext(run), "evo", HuggingFace())
    text = run.card("evo", HUGGINGFACE).read_text()
    assert "# tiny without 2 of 3 attention and 2 of 3 MLP modules" in text
    assert "| 0 | 0 | dropped (zeros) | kept |" in text
    assert "| 1 | - | dropped | dropped |" in text and "| 2 | 1 | kept | dropped (zeros) |" in text
    stored = _numbers(AutoModelForCausalLM.from_pretrained(run.export("evo", HUGGINGFACE)))
    depth = size_of(run, pd.read_parquet(run.configuration("evo"))).depth
    assert f"| parameters stored in this folder | {stored:,} |" in text
    assert f"| parameters in use | {depth.in_use:,} (" in text and stored > depth.in_use
    assert "| key-value cache saved here | 33.3% (1 of 3 attention modules) |" in text
    assert "1 block that lost both modules is gone" in text and "2 modules of blocks that keep the other one" in text
    assert "base_model_relation" not in text and "bits per weight asked" not in text and "method: drop" in text


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_a_shorter_model_is_evaluated_like_any_other(tmp_path, name):
    run = Run(tmp_path / "run")
    model = build(name)
    write_depth_model(run, model)
    write_depth_configuration(run, "evo", MIXED)
    run_export(StageContext(run), "evo", HuggingFace())
    ids = write_tokens(run, "held")
    for search in ("dense", "evo"):
        evaluate_perplexity(StageContext(run, ComputeSettings(device="cpu")), search, ["held"])
    row = read_table(run.perplexity("evo"), PERPLEXITY).iloc[0]
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        with without(model, MIXED):
            pruned = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    nll = nn.functional.nll_loss(pruned.flatten(0, 1), ids[:, 1:].flatten())
    kl = nn.functional.kl_div(pruned, dense, log_target=True, reduction="none").sum(-1).mean()
    assert row["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-3)


def test_the_archive_holds_what_the_folder_holds(run):
    run_export(StageContext(run), "evo", Archive())
    archive = load_archive(run.export("evo", "archive") / ARCHIVE)
    exported = Checkpoint(run.export("evo", HUGGINGFACE))
    weights = exported.read(exported.names())
    assert archive.keys() == weights.keys()
    differing = {name for name, weight in weights.items() if not torch.equal(archive[name], weight)}
    inside = ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]
    assert differing == {f"model.layers.{name}.weight" for name in inside}
    assert not any(archive[name].any() for name in differing)  # zeros, whose module gives zeros in either


def _measured(run, model):
    write_table(
        pd.DataFrame([(model, "held", 10.0, 0.1, 0.01, 0.9, 0.02, 100)], columns=PERPLEXITY.names),
        run.perplexity(model),
        PERPLEXITY,
        provenance(),
    )
    write_table(pd.DataFrame(columns=TASKS.names), run.tasks(model), TASKS, provenance())
    run.tasks_json(model).write_text(json.dumps({}))


def test_the_report_counts_modules_in_place_of_bits(run):
    write_depth_configuration(run, "blocks", {(1, "attn"), (1, "mlp")})
    write_tokens(run, "held")
    for model in ("dense", "evo", "blocks"):
        _measured(run, model)
    for search in ("evo", "blocks"):
        write_way(run, search, evolved=False)
    table = compare(run, ["evo", "blocks"])
    assert BITS not in table.columns
    rows = {
        name: [cells[column].value for column in DROPPED.values()]
        for name, cells in table.rows.items()
        if name != "dense"
    }
    assert rows == {"evo": [2, 2], "blocks": [1, 1]}
    assert table.rows["dense"][PARAMETERS].value > table.rows["blocks"][PARAMETERS].value
    assert table.rows["dense"][SIZE].value > table.rows["blocks"][SIZE].value
    write_report(StageContext(run), ["evo", "blocks"])
    page = run.report.read_text()
    assert "2 attn and 2 mlp modules dropped" in page and "Modules that are dropped" in page
    assert "bits per weight asked" not in page and "unit: module" in page
    assert "attn modules" in run.summary.read_text()
