"""The variants stage on disk and the store that reads it."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evopress.artifacts import atomic
from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import LAYERS, VARIANTS, read_table, write_table
from evopress.artifacts.tensors import read_manifest, tensor_digest, write_tensors
from evopress.compression.gptq import gptq
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.util.errors import ArtifactError, CompressionError, ConfigError, DamagedError

CPU = ComputeSettings(device="cpu")
SETTINGS = Gptq(bits=(2, 3, 5), group_size=8)
SHAPES = {"attn.q": (16, 24), "attn.k": (8, 24), "attn.o": (24, 16), "mlp.down": (24, 32)}
SHARED = {"attn.k": "attn.q"}
BLOCKS = 2


def layer_rows() -> pd.DataFrame:
    rows = []
    for block in range(BLOCKS):
        for layer, (outputs, inputs) in SHAPES.items():
            rows.append(
                {
                    "block": block,
                    "layer": layer,
                    "name": f"m.{block}.{layer}",
                    "kind": layer.split(".")[1],
                    "module": layer.split(".")[0],
                    "input_group": SHARED.get(layer, layer),
                    "rows": outputs,
                    "columns": inputs,
                    "parameters": outputs * inputs,
                }
            )
    return pd.DataFrame(rows)


def prepare(root: Path) -> Run:
    """Weights, the table of layers and Hessians of a model that exists on disk only."""
    run = Run(root)
    generator = torch.Generator().manual_seed(0)
    layers = layer_rows()
    run.model.mkdir(parents=True)
    weights = {
        f"{row.name}.weight": torch.randn(row.rows, row.columns, generator=generator).bfloat16()
        for row in layers.itertuples()
    }
    save_file(weights, run.model / "model.safetensors")
    write_text(run.model_manifest, json.dumps({"fingerprint": "abc"}))
    write_table(layers, run.layers, LAYERS, Provenance("model", "{}", "abc"))
    for block in range(BLOCKS):
        inputs = {layer: columns for layer, (_, columns) in SHAPES.items() if layer not in SHARED}
        samples = {layer: torch.randn(100, columns, generator=generator) for layer, columns in inputs.items()}
        write_hessians(run, block, {layer: x.t() @ x for layer, x in samples.items()})
    return run


def write_hessians(run: Run, block: int, hessians: dict[str, Tensor], model: str = "abc") -> None:
    write_tensors(hessians, run.hessian(block), Provenance("hessians", '{"shards": 1}', model), {"tokens": 100})


def make_all(run: Run, settings: Gptq = SETTINGS, name: str = "q") -> VariantStore:
    for block in range(BLOCKS):
        make_variants(StageContext(run, CPU), name, settings, [block])
    return VariantStore(run, name)


def test_stored_weights_are_those_that_gptq_chose(tmp_path):
    run = prepare(tmp_path)
    store = make_all(run)
    weights = load_file(run.model / "model.safetensors")
    for block in range(BLOCKS):
        hessians = load_file(run.hessian(block))
        for layer in SHAPES:
            weight = weights[f"m.{block}.{layer}.weight"].float()
            hessian = hessians[SHARED.get(layer, layer)]
            alone = gptq(weight, hessian, SETTINGS.bits, 8, activation_order=True, clip_search=True, passes=2)
            for index, bits in enumerate(SETTINGS.bits):
                found = store.weight(block, layer, str(bits), "cpu", torch.float32)
                # stacked with its neighbours, a row may round one tie the other way
                assert ((found - alone.weights[index]).abs().amax(1) > 1e-6).sum() <= 1
                assert torch.equal(store.weight(block, layer, str(bits), "cpu", torch.bfloat16), found.bfloat16())


def test_table_tells_cost_size_and_error(tmp_path):
    run = prepare(tmp_path)
    store = make_all(run)
    table = store.table
    assert len(table) == BLOCKS * len(SHAPES) * 3
    assert list(table.columns) == VARIANTS.names
    weights = load_file(run.model / "model.safetensors")
    for row in table.itertuples():
        rows, columns = SHAPES[row.layer]
        parts = store.packed(row.block, row.layer, row.level)
        assert row.cost == int(row.level) * rows * columns == row.value * row.parameters
        assert row.bytes == sum(part.nbytes for part in parts.values())
        assert row.bits_per_weight == 8 * row.bytes / row.parameters
        assert row.bits_per_weight == pytest.approx(row.value + (16 + row.value) / 8, rel=0.02)
        assert row.damping == SETTINGS.damping
        weight = weights[f"{row.name}.weight"].double()
        hessian = load_file(run.hessian(row.block))[SHARED.get(row.layer, row.layer)].double()
        difference = store.weight(row.block, row.layer, row.level).double() - weight
        relative = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
        assert row.error == pytest.approx(float(relative), rel=1e-3)
    by_level = table.groupby("value")["error"].mean()
    assert by_level.is_monotonic_decreasing


def test_little_memory_changes_nothing(tmp_path):
    run = prepare(tmp_path)
    plenty = make_all(run)
    make_variants(StageContext(run, ComputeSettings(device="cpu", memory_gb=1e-7)), "small", SETTINGS, [0])
    one = load_file(run.variant_tensors("small", 0))
    other = load_file(run.variant_tensors("q", 0))
    assert one.keys() == other.keys()
    assert sum(not torch.equal(one[name], other[name]) for name in one) <= 1  # one flipped tie
    assert plenty.table is not None


def test_excluded_layers_stay_dense(tmp_path):
    run = prepare(tmp_path)
    store = make_all(run, SETTINGS.model_copy(update={"exclude": ("m.0.*", "*.down")}))
    assert set(zip(store.table["block"], store.table["layer"], strict=True)) == {
        (1, layer) for layer in SHAPES if layer != "mlp.down"
    }
    with pytest.raises(ArtifactError, match="that layer stays dense"):
        store.weight(1, "mlp.down", "3")


def test_pattern_that_matches_nothing(tmp_path):
    run = prepare(tmp_path)
    with pytest.raises(ConfigError, match=r"variants\.q\.exclude: '\*\.up' matches no layer; .*'m\.0\.attn\.q'"):
        make_variants(StageContext(run, CPU), "q", SETTINGS.model_copy(update={"exclude": ("*.up",)}), [0])


def test_group_size_that_does_not_divide_names_the_layer(tmp_path):
    """The offer divides every layer: 16 would do for this one, and then fail for those with 24 inputs."""
    run = prepare(tmp_path)
    with pytest.raises(CompressionError, match=r"m\.0\.attn\.o: group_size 12 .* 16 input features; 8 does"):
        make_variants(StageContext(run, CPU), "q", SETTINGS.model_copy(update={"group_size": 12}), [0])
    assert not run.variant_table("q", 0).exists() and not run.variant_tensors("q", 0).exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, bad):
    run = prepare(tmp_path)
    path = run.model / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights["m.0.attn.k.weight"][2, 3] = bad
    save_file(weights, path)
    with pytest.raises(CompressionError, match=r"m\.0\.attn\.k: NaN or infinity in the weights"):
        make_variants(StageContext(run, CPU), "q", SETTINGS, [0])


def test_hessians_that_are_not_finite(tmp_path):
    run = prepare(tmp_path)
    hessians = load_file(run.hessian(0))
    write_hessians(run, 0, {**hessians, "attn.o": torch.full((16, 16), float("nan"))})
    with pytest.raises(CompressionError, match=r"m\.0\.attn\.o: NaN or infinity in the Hessian"):
        make_variants(StageContext(run, CPU), "q", SETTINGS, [0])


def test_layer_that_no_token_reached(tmp_path):
    run = prepare(tmp_path)
    write_hessians(run, 0, {**load_file(run.hessian(0)), "mlp.down": torch.zeros(32, 32)})
    with pytest.raises(CompressionError, match=r"m\.0\.mlp\.down: no calibration token reached it"):
        make_variants(StageContext(run, CPU), "q", SETTINGS, [0])
    make_variants(StageContext(run, CPU), "q", SETTINGS.model_copy(update={"exclude": ("*.down",)}), [0])


def test_hessians_of_another_model(tmp_path):
    run = prepare(tmp_path)
    write_hessians(run, 0, load_file(run.hessian(0)), model="other")
    with pytest.raises(ArtifactError, match=r"hessians/block_000.*another model.*delete it"):
        make_variants(StageContext(run, CPU), "q", SETTINGS, [0])


def test_damaged_hessians(tmp_path):
    run = prepare(tmp_path)
    content = run.hessian(0).read_bytes()
    run.hessian(0).write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match=r"hessians/block_000.*damaged"):
        make_variants(StageContext(run, CPU), "q", SETTINGS, [0])


def test_block_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match="has no block 7; the model has 2 blocks"):
        make_variants(StageContext(prepare(tmp_path), CPU), "q", SETTINGS, [7])


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    run = prepare(tmp_path)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", full)
    with pytest.raises(ArtifactError, match="no space left"):
        make_variants(StageContext(run, CPU), "q", SETTINGS, [0])
    assert not [path for path in run.variant_table("q", 0).parent.rglob("*") if path.is_file()]


def test_store_names_the_blocks_of_other_settings(tmp_path):
    run = prepare(tmp_path)
    make_all(run)
    make_variants(StageContext(run, CPU), "q", SETTINGS.model_copy(update={"symmetric": True}), [1])
    with pytest.raises(ArtifactError, match=r"variants 'q': blocks 1 were made by other settings"):
        VariantStore(run, "q")


def test_store_notices_other_hessians(tmp_path):
    run = prepare(tmp_path)
    make_all(run)
    path = run.hessian(1)
    write_tensors(load_file(path), path, Provenance("hessians", '{"shards": 2}', "abc"), {"tokens": 100})
    make_variants(StageContext(run, CPU), "q", SETTINGS, [1])
    with pytest.raises(ArtifactError, match="blocks 1 were made by other settings"):
        VariantStore(run, "q")


def test_store_of_another_model(tmp_path):
    run = prepare(tmp_path)
    make_all(run)
    write_text(run.model_manifest, json.dumps({"fingerprint": "other"}))
    assert read_model_fingerprint(run) == "other"
    with pytest.raises(ArtifactError, match="another model"):
        VariantStore(run, "q")


def test_store_with_a_damaged_block(tmp_path):
    run = prepare(tmp_path)
    make_all(run)
    path = run.variant_tensors("q", 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stored = VariantStore(run, "q")  # a search reads it; who hands the weights on notices
    [name] = [name for name, tensor in load_file(path).items() if differs(path, name, tensor)]
    layer, level, part = name.rsplit("/", 2)
    assert part in stored.packed(1, layer, level)
    with pytest.raises(DamagedError, match=rf"block_001.*damaged \({name} differs from the checksum\)") as caught:
        VariantStore(run, "q", verify=True).packed(1, layer, level)
    assert set(caught.value.files) == {path, manifest_path(path)}
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedError, match=r"block_001.*damaged"):
        VariantStore(run, "q")


def differs(path: Path, name: str, tensor: Tensor) -> bool:
    return read_manifest(path)["tensors"][name] != tensor_digest(tensor)


def test_store_with_a_missing_block(tmp_path):
    run = prepare(tmp_path)
    make_variants(StageContext(run, CPU), "q", SETTINGS, [0])
    with pytest.raises(ArtifactError, match=r"block_001.*missing"):
        VariantStore(run, "q")


def test_store_knows_what_it_lacks(tmp_path):
    store = make_all(prepare(tmp_path))
    with pytest.raises(ArtifactError, match=r"block 0 has no attn.q at level 4; its levels are 2, 3, 5"):
        store.packed(0, "attn.q", "4")


def test_manifest_records_what_it_was_made_from(tmp_path):
    run = prepare(tmp_path)
    make_all(run)
    manifest = read_manifest(run.variant_tensors("q", 0))
    digests = read_manifest(run.hessian(0))["tensors"]
    assert manifest["facts"] == {"hessians": {"shards": 1}, "tokens": 100, "hessian_digests": digests}
    assert Gptq.model_validate_json(manifest["provenance"]["settings"]) == SETTINGS


def test_old_table_does_not_stand_beside_new_tensors(tmp_path, monkeypatch):
    """Killed between the two writes, a remade block must not look finished."""
    run = prepare(tmp_path)
    make_all(run)
    monkeypatch.setattr("evopress.compression.block_files.atomic_file", _killed)
    with pytest.raises(KeyboardInterrupt):
        make_variants(StageContext(run, CPU), "q", SETTINGS.model_copy(update={"bits": (4,)}), [0])
    assert not run.variant_table("q", 0).exists()
    assert manifest_path(run.variant_tensors("q", 0)).exists()
    assert len(read_table(run.variant_table("q", 1), VARIANTS)) == 12


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
