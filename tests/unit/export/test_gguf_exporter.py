"""The exporter writes what a search has found: its blocks as they are, and models that have lost modules."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from depth_run import SEARCH, write_depth_configuration, write_depth_model
from finished_run import provenance
from gguf import GGMLQuantizationType
from gguf_layouts import byte_level, folder_of, packed_weights, tiny

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, write_table
from evopress.compression import store
from evopress.config.context import StageContext
from evopress.export.exporters.gguf import GgufExporter
from evopress.export.run import stitch_model
from evopress.models.gguf_header import GgufHeader, read_gguf_header
from evopress.models.gguf_weights import read_tensor
from evopress.util.errors import ArtifactError

MIXED = {(0, "attn"), (1, "attn"), (1, "mlp"), (2, "attn")}


def exported(run: Run, folder: Path, exporter: GgufExporter | None = None) -> GgufHeader:
    folder.mkdir()
    (exporter or GgufExporter()).write(StageContext(run), "evo", folder)
    return read_gguf_header(folder / "evo.gguf")


@pytest.fixture
def packed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A search that chose Q8_0 for every layer but the first, which is stored in groups of integers."""
    run, model = Run(tmp_path / "run"), tiny("llama")
    write_depth_model(run, model)
    packed = packed_weights(model, GGMLQuantizationType.Q8_0)
    folder_of(model, run.stitched("evo"))
    units = [name.removesuffix(".weight") for name in packed]
    other = units[0]

    class Store:
        def __init__(self, _: Run, name: str) -> None:
            assert name == "gguf"

        def format(self, block: int, layer: str, level: str) -> str:
            assert level == "Q8_0"
            return "int4-g32" if f"model.layers.{block}.{layer}" == other else "gguf-Q8_0"

        def packed(self, block: int, layer: str, level: str) -> dict[str, torch.Tensor]:
            return {"blocks": torch.from_numpy(packed[f"model.layers.{block}.{layer}.weight"].blocks)}

    monkeypatch.setattr(store, "VariantStore", Store)
    rows = []
    for unit in units:
        block, layer = unit.removeprefix("model.layers.").split(".", 1)
        size = packed[f"{unit}.weight"].blocks.nbytes
        rows.append((unit, int(block), layer, "gguf", "Q8_0", 8.0, size, size, size))
    table = pd.DataFrame(rows, columns=CONFIGURATION.names)
    write_table(table, run.configuration("evo"), CONFIGURATION, provenance(SEARCH))
    return run


def test_blocks_of_the_search_are_in_the_file(packed_run: Run, tmp_path: Path) -> None:
    header = exported(packed_run, tmp_path / "out", GgufExporter(dense="bf16", dequantize=True))
    kinds = {name: GGMLQuantizationType(tensor.kind).name for name, tensor in header.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "BF16"
    assert {kinds[f"blk.{block}.{part}.weight"] for block in range(3) for part in ("ffn_up", "attn_v")} == {"Q8_0"}
    assert header.metadata["general.name"] == "tiny evo"


def test_other_formats_are_refused_unless_asked_for(packed_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.self_attn\.q_proj: is stored as int4-g32, which is no"):
        exported(packed_run, tmp_path / "out")


@pytest.mark.parametrize(("name", "architecture"), [("llama", "deci"), ("qwen2", "qwen2")])
def test_models_that_lost_modules(name: str, architecture: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_depth_model(run, tiny(name))
    byte_level().save_pretrained(run.model)
    write_depth_configuration(run, "evo", MIXED)
    stitch_model(run, "evo")
    header = exported(run, tmp_path / "out")
    assert header.architecture == architecture
    assert header.metadata[f"{architecture}.block_count"] == 2
    if architecture == "deci":
        assert header.metadata["deci.attention.head_count"] == [4, 0]
    else:
        assert not read_tensor(header.tensors["blk.1.attn_output.weight"]).any()
