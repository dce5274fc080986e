"""The exporter writes what a search has found: its blocks as they are, and models that have lost modules."""

from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from depth_run import SEARCH, write_depth_configuration, write_depth_model
from finished_run import provenance
from gguf_layouts import byte_level, tiny

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, write_table
from evopress.compression.base import LayerMethod
from evopress.compression.block_files import variant_table, write_variants
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import variants_provenance
from evopress.config.context import StageContext
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.models.checkpoint import Checkpoint
from evopress.models.gguf_header import GgufHeader, read_gguf_header
from evopress.models.gguf_weights import read_tensor
from evopress.search.strategies.uniform import Uniform
from evopress.util.errors import ArtifactError

MIXED = {(0, "attn"), (1, "attn"), (1, "mlp"), (2, "attn")}


def exported(run: Run, exporter: GgufFile | None = None) -> GgufHeader:
    run_export(StageContext(run), "evo", HuggingFace())
    run_export(StageContext(run), "evo", exporter or GgufFile())
    return read_gguf_header(run.export("evo", "gguf") / "evo.gguf")


def searched(folder: Path, method: LayerMethod, levels: list[str]) -> Run:
    """A run that chose ``levels`` by turns from the variants of a method."""
    run = Run(folder / "run")
    write_depth_model(run, tiny("llama"))
    byte_level().save_pretrained(run.model)
    context, layers = StageContext(run), pd.read_parquet(run.layers)
    weights = Checkpoint(run.model).read([f"{name}.weight" for name in layers["name"]])
    rows = []
    for block, own in layers.groupby("block"):
        variants = [
            variant
            for row in own.itertuples()
            for variant in method.compress({row.layer: weights[f"{row.name}.weight"]}, torch.eye(row.columns))
        ]
        table = variant_table(variants, own, method)
        write_variants(run, "v", int(block), variants, table, variants_provenance(context, method), {})
        for number, (name, offered) in enumerate(table.groupby("name", sort=False)):
            level = offered[offered["level"] == levels[number % len(levels)]].iloc[0]
            rows.append({**level.to_dict(), "unit": name, "variants": "v"})
    write_table(pd.DataFrame(rows), run.configuration("evo"), CONFIGURATION, provenance(SEARCH))
    return run


def test_the_file_holds_the_blocks_that_the_search_judged(tmp_path: Path) -> None:
    run = searched(tmp_path, Gguf(types=("Q4_0", "Q8_0"), embedding=False), ["Q4_0", "Q8_0"])
    header = exported(run, GgufFile(dense="bf16"))
    kinds = {name: gguf.GGMLQuantizationType(tensor.kind).name for name, tensor in header.tensors.items()}
    assert kinds["token_embd.weight"] == "BF16" and kinds["output_norm.weight"] == "F32"
    assert {kinds[f"blk.{block}.{part}.weight"] for block in range(3) for part in ("ffn_up", "attn_v")} == {
        "Q4_0",
        "Q8_0",
    }
    configuration = pd.read_parquet(run.configuration("evo")).set_index("unit")
    name = "model.layers.1.mlp.up_proj"
    assert kinds["blk.1.ffn_up.weight"] == configuration.loc[name, "level"]
    reference = Checkpoint(run.export("evo", "huggingface")).read([f"{name}.weight"])[f"{name}.weight"]
    assert np.array_equal(read_tensor(header.tensors["blk.1.ffn_up.weight"]).numpy(), reference.numpy())


def test_other_levels_are_refused_unless_asked_for(tmp_path: Path) -> None:
    run, strategy = searched(tmp_path, Gptq(bits=(3,), group_size=32), ["3"]), Uniform(variants="v", target=3)
    (problem,) = GgufFile().problems("searches.evo.exports", Gptq(), strategy)
    assert problem.startswith("searches.evo.exports: 'v' has levels that are no GGUF types; search over variants of")
    assert not list(GgufFile(dequantize=True).problems("searches.evo.exports", Gptq(), strategy))
    assert not list(GgufFile().problems("searches.evo.exports", Gguf(), strategy))
    with pytest.raises(ArtifactError, match=r"q_proj\.weight: is stored as int3-g32, which is no GGUF type"):
        exported(run)
    header = exported(run, GgufFile(dequantize=True))
    assert gguf.GGMLQuantizationType(header.tensors["blk.0.attn_q.weight"].kind).name == "F16"


@pytest.mark.parametrize(("name", "architecture"), [("llama", "deci"), ("qwen2", "qwen2")])
def test_models_that_lost_modules(name: str, architecture: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_depth_model(run, tiny(name))
    byte_level().save_pretrained(run.model)
    write_depth_configuration(run, "evo", MIXED)
    header = exported(run)
    assert header.architecture == architecture
    assert header.metadata[f"{architecture}.block_count"] == 2
    if architecture == "deci":
        assert header.metadata["deci.attention.head_count"] == [4, 0]
    else:
        assert not read_tensor(header.tensors["blk.1.attn_output.weight"]).any()


def test_models_that_lost_modules_hold_the_rest_as_chosen(tmp_path: Path) -> None:
    run = searched(tmp_path, Gguf(types=("Q4_0", "Q8_0"), embedding=False), ["Q4_0", "Q8_0"])
    layers, modules = pd.read_parquet(run.configuration("evo")), write_depth_configuration(run, "evo", MIXED)
    kinds = layers["layer"].str.contains("attn").map({True: "attn", False: "mlp"})
    kept = layers[[place not in MIXED for place in zip(layers["block"], kinds, strict=True)]]
    write_table(pd.concat([kept, modules]), run.configuration("evo"), CONFIGURATION, provenance(SEARCH))
    header = exported(run)
    assert header.metadata["deci.attention.head_count"] == [4, 0]
    own = [kept[kept["block"] == block].set_index("layer")["level"] for block in (0, 2)]
    for part, layer in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
        for number in (0, 1):
            found = gguf.GGMLQuantizationType(header.tensors[f"blk.{number}.{part}.weight"].kind).name
            assert found == own[number][layer]
