"""The variants stage with the methods of the sparsity family: artifacts, bad input, and the compact archive."""

import logging
import math
from pathlib import Path

import pytest
import torch
from finished_run import BLOCKS, make_results, provenance, write_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from evopress.artifacts.paths import HUGGINGFACE, Run
from evopress.artifacts.tables import CONFIGURATION, read_provenance, read_table, write_table
from evopress.artifacts.tables import LAYERS as LAYER_SCHEMA
from evopress.artifacts.tensors import read_tensors, write_tensors
from evopress.compression.methods.pruning import Magnitude, SparseGpt, Wanda
from evopress.compression.sparsity import PruningMethod, of_same_shape
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.export.exporters.archive import ARCHIVE, Archive, load_archive
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.models.blockwise import BlockwiseModel
from evopress.models.structure import layer_table
from evopress.search.run import run_search
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.uniform import Uniform
from evopress.util.errors import ArtifactError, CompressionError, ConfigError, ModelError
from evopress.workflow.history import require_settings

COMPUTE = ComputeSettings(device="cpu", memory_gb=0.01)
LEVELS = {"sparsity": 0.5, "step": 20, "levels": 3}
METHODS = [SparseGpt(block_size=8, **LEVELS), Wanda(**LEVELS), Magnitude(**LEVELS)]
SPARSEGPT = METHODS[0]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A tiny model with search tokens and Hessians of inputs that are correlated and of unlike scales."""
    run = make_results(tmp_path)
    write_tokens(run, "search", sequences=6)
    layers = layer_table(BlockwiseModel.from_folder(run.model, torch.device("cpu")).model)
    write_table(layers, run.layers, LAYER_SCHEMA, provenance())
    generator = torch.Generator().manual_seed(0)
    for block in range(BLOCKS):
        rows = layers[layers["block"] == block].drop_duplicates("input_group")
        inputs = {row.input_group: correlated(100, row.columns, generator) for row in rows.itertuples()}
        hessians = {group: x.t() @ x for group, x in inputs.items()}
        write_tensors(hessians, run.hessian(block), provenance(), {"tokens": 100})
    return run


def correlated(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing * torch.linspace(0.3, 3, columns)


def make_all(run: Run, settings: PruningMethod, name: str = "s") -> VariantStore:
    for block in range(BLOCKS):
        make_variants(StageContext(run, COMPUTE), name, settings, [block])
    return VariantStore(run, name)


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings.method)
def test_every_method_writes_the_same_levels_with_exact_costs(run: Run, settings: PruningMethod) -> None:
    store = make_all(run, settings)
    weights = load_file(run.model / "model.safetensors")
    groups = read_table(run.layers, LAYER_SCHEMA).set_index("name")["input_group"]
    for row in store.table.itertuples():
        dense = weights[f"{row.name}.weight"]
        stored = store.weight(row.block, row.layer, row.level)
        assert row.cost == row.parameters // 2 - 20 * int(row.level)
        assert row.value == pytest.approx(1 - row.cost / row.parameters)
        assert int((stored != 0).sum()) == row.cost
        assert row.bytes == -(-row.parameters // 8) + row.cost * dense.itemsize
        hessian = read_tensors(run.hessian(row.block))[groups[row.name]].double()
        change = (stored - dense).double()
        relative = ((change @ hessian) * change).sum() / ((dense.double() @ hessian) * dense.double()).sum()
        assert row.error == pytest.approx(float(relative), rel=1e-3)
        if settings.method != "sparsegpt":
            assert torch.equal(stored[stored != 0], dense[stored != 0])
    assert store.table.groupby("value")["error"].mean().is_monotonic_increasing


def test_sparsegpt_errs_least_then_wanda(run: Run) -> None:
    errors = {s.method: make_all(run, s, s.method).table.query("level == '0'")["error"].mean() for s in METHODS}
    assert errors["sparsegpt"] < 0.9 * errors["wanda"] < 0.9 * errors["magnitude"]


def test_wanda_takes_evenly_from_rows_and_magnitude_from_anywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 16, generator=generator) * torch.arange(1, 11)[:, None]
    hessian = torch.diag(torch.arange(1.0, 17.0) ** 2)
    levels = {"sparsity": 0.4, "step": 13, "levels": 1}
    by_wanda = {v.level: v for v in Wanda(**levels).compress({"a": weight}, hessian)}
    for level, removed in {"-1": 51, "0": 64, "+1": 77}.items():
        mask = torch.from_numpy(by_wanda[level].parts["mask"].numpy())
        kept = (mask[:, None] >> torch.arange(8)).bitwise_and(1).view(10, 16).bool()
        assert int((~kept).sum()) == removed
        assert set((~kept).sum(1).tolist()) <= {removed // 10, removed // 10 + 1}
        scores = weight.abs() * torch.arange(1.0, 17.0)
        assert all(scores[row][kept[row]].min() >= scores[row][~kept[row]].max() for row in range(10))
    (plain,) = Magnitude(sparsity=0.4, step=13, levels=0).compress({"a": weight}, hessian)
    assert plain.parts["values"].abs().min() >= weight.abs().flatten().sort().values[63]


@pytest.mark.parametrize("method", [SparseGpt, Wanda, Magnitude])
def test_patterns_hold_in_every_group(method: type[PruningMethod]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = correlated(200, 16, generator)
    weights = {"a": torch.randn(6, 16, generator=generator), "b": torch.randn(5, 16, generator=generator)}
    variants = method(patterns=("2:4", "4:8", "1:4")).compress(weights, inputs.t() @ inputs)
    assert [(v.layer, v.level) for v in variants[:3]] == [("a", "2:4"), ("a", "1:4"), ("a", "4:8")]
    for variant in variants:
        keep, of = map(int, variant.level.split(":"))
        bits = (variant.parts["mask"][:, None] >> torch.arange(8)).bitwise_and(1).flatten()
        assert (bits[: weights[variant.layer].numel()].view(-1, of).sum(1) == keep).all()
        assert variant.cost == weights[variant.layer].numel() * keep // of


def test_little_memory_changes_nothing(run: Run) -> None:
    make_all(run, SPARSEGPT)
    small = ComputeSettings(device="cpu", memory_gb=1e-7)
    make_variants(StageContext(run, small), "small", SPARSEGPT, [0])
    one, other = (load_file(run.variant_tensors(name, 0)) for name in ("s", "small"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_layers_share_a_sweep_only_where_the_memory_holds_a_level_of_each() -> None:
    weights = {name: torch.zeros(12, 16) for name in ("gate", "up", "extra")} | {"other": torch.zeros(4, 16)}
    level = 16 * 12 * 16  # bytes that a level of one of them takes
    stacks = {memory: list(of_same_shape(weights, memory, 16)) for memory in (math.inf, 2.5 * level, 1.0)}
    assert stacks[math.inf] == [["gate", "up", "extra"], ["other"]]
    assert stacks[2.5 * level] == [["gate", "up"], ["extra"], ["other"]]
    assert stacks[1.0] == [["gate"], ["up"], ["extra"], ["other"]]


def test_layers_too_small_for_a_step_are_fixed_and_the_log_says_so(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("evopress").propagate = True
    with caplog.at_level(logging.INFO, logger="evopress"):
        store = make_all(run, SPARSEGPT.model_copy(update={"step": 100}))
    sizes = store.table.groupby("layer").size()
    assert sizes["self_attn.k_proj"] == BLOCKS  # 128 weights
    assert sizes["mlp.down_proj"] == 3 * BLOCKS  # 384 weights
    assert "self_attn.k_proj, self_attn.v_proj: 128 weights leave no room for a step of 100; fixed" in caplog.text
    run_search(StageContext(run, COMPUTE), "u", Uniform(variants="s", target=0.5))
    assert set(read_table(run.configuration("u"), CONFIGURATION)["level"]) == {"0"}


def test_a_sparsity_that_leaves_a_layer_nothing_names_it(run: Run) -> None:
    with pytest.raises(
        CompressionError, match=r"self_attn\.q_proj: sparsity 0\.9999999 leaves nothing of a layer of 256 weights"
    ):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT.model_copy(update={"sparsity": 0.9999999}), [0])
    assert not run.variant_tensors("s", 0).exists()


def test_a_pattern_that_does_not_divide_a_layer_names_it(run: Run) -> None:
    with pytest.raises(CompressionError, match=r"self_attn\.q_proj.*multiples of 7, but there are 16"):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT.model_copy(update={"patterns": ("2:7",)}), [0])


def test_excluded_layers_stay_dense_and_patterns_must_match(run: Run) -> None:
    store = make_all(run, SPARSEGPT.model_copy(update={"exclude": ("*.down_proj",)}))
    assert "mlp.down_proj" not in set(store.table["layer"])
    with pytest.raises(ConfigError, match=r"variants\.s\.exclude: '\*\.experts' matches no layer"):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT.model_copy(update={"exclude": ("*.experts",)}), [0])


def replace_hessian(run: Run, group: str, hessian: Tensor) -> None:
    hessians = read_tensors(run.hessian(0)) | {group: hessian}
    write_tensors(hessians, run.hessian(0), provenance(), {"tokens": 100})


def test_fewer_tokens_than_inputs_and_dead_inputs_give_finite_weights(run: Run) -> None:
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    inputs[:, 2] = 0
    replace_hessian(run, "mlp.gate_proj", inputs.t() @ inputs)
    store = make_all(run, SPARSEGPT)
    for level in ("-3", "0", "+3"):
        weight = store.weight(0, "mlp.gate_proj", level)
        assert torch.isfinite(weight).all()
        assert not weight[:, 2].any()


def test_nan_in_a_hessian_names_the_layers(run: Run) -> None:
    replace_hessian(run, "mlp.gate_proj", torch.full((16, 16), torch.nan))
    with pytest.raises(CompressionError, match=r"layers\.0\.mlp\.gate_proj, .*up_proj: NaN or infinity"):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT, [0])
    assert not run.variant_tensors("s", 0).exists()


def test_nan_in_weights_names_the_layer(run: Run) -> None:
    path = run.model / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.up_proj: NaN or infinity"):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT, [1])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_files_cut_short_are_named(run: Run) -> None:
    make_all(run, SPARSEGPT)
    cut(run.variant_tensors("s", 1))
    with pytest.raises(ArtifactError, match=r"variants/s/block_001\.safetensors: damaged"):
        VariantStore(run, "s")
    cut(run.hessian(0))
    with pytest.raises(ArtifactError, match=r"hessians/block_000\.safetensors: damaged"):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT, [0])
    cut(run.model / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut short"):
        make_variants(StageContext(run, COMPUTE), "s", SPARSEGPT, [1])


def searched(run: Run) -> None:
    make_all(run, SPARSEGPT)
    settings = Evolution(
        variants="s",
        target=0.5,
        generations=4,
        offspring=6,
        survivors=(3, 1),
        tokens=(18, 48),
        group_rule="none",
    )
    run_search(StageContext(run, COMPUTE), "q", settings)


def test_evolution_trades_steps_between_layers_of_different_size(run: Run) -> None:
    searched(run)
    configuration = read_table(run.configuration("q"), CONFIGURATION)
    assert configuration["cost"].sum() == configuration["parameters"].sum() // 2
    assert configuration["level"].astype(int).sum() == 0
    assert set(configuration["level"]) != {"0"}


def test_the_archive_holds_the_stitched_model_in_less_space(run: Run) -> None:
    searched(run)
    run_export(StageContext(run), "q", HuggingFace())
    run_export(StageContext(run), "q", Archive())
    stitched = load_file(run.export("q", HUGGINGFACE) / "model.safetensors")
    found = load_archive(run.export("q", "archive") / ARCHIVE)
    assert found.keys() == stitched.keys()
    assert all(torch.equal(found[name], stitched[name]) and found[name].dtype == stitched[name].dtype for name in found)
    configuration = read_table(run.configuration("q"), CONFIGURATION)
    files = run.export("q", HUGGINGFACE) / "model.safetensors", run.export("q", "archive") / ARCHIVE
    saved = files[0].stat().st_size - files[1].stat().st_size
    assert saved == pytest.approx(4 * configuration["parameters"].sum() - configuration["bytes"].sum(), abs=4000)


def test_an_archive_tells_which_search_chose_its_levels(run: Run) -> None:
    searched(run)
    run_export(StageContext(run), "q", Archive())
    own = read_provenance(run.configuration("q")).settings
    other = own.replace('"generations":4', '"generations":5')
    require_settings([(run.export_manifest("q", "archive"), own)], run.root)
    with pytest.raises(ArtifactError, match=r"exports/q/archive\.json: was made by other settings \(generations: 4"):
        require_settings([(run.export_manifest("q", "archive"), other)], run.root)


def test_a_damaged_archive_is_refused(run: Run, tmp_path: Path) -> None:
    searched(run)
    run_export(StageContext(run), "q", Archive())
    archive = run.export("q", "archive") / ARCHIVE
    content = bytearray(archive.read_bytes())
    content[-5] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"damaged .differs from its checksum"):
        load_archive(archive)
    cut(archive)
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        load_archive(archive)
    with pytest.raises(ArtifactError, match="missing"):
        load_archive(tmp_path / "nothing.safetensors")
    with pytest.raises(ArtifactError, match="no archive"):
        load_archive(run.model / "model.safetensors")
