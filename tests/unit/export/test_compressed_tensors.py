"""A folder in the format compressed-tensors: plain transformers loads it, and it computes what the search judged."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from architectures import LENGTH, tokens
from finished_run import provenance, write_tokens
from search_run import COMPUTE
from tiny_sources import tokenizer

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, LAYERS, write_table
from evopress.compression.base import Method
from evopress.compression.block_files import variant_table, write_variants
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt
from evopress.compression.stage import variants_provenance
from evopress.config.context import StageContext
from evopress.export.card import write_card
from evopress.export.exporters.compressed_tensors import CompressedTensors
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.pack_quantized import pack_words
from evopress.export.stage import run_export
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import Checkpoint
from evopress.models.structure import layer_table
from evopress.search.base import Strategy
from evopress.search.configuration import Configuration
from evopress.search.run import run_search
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.uniform import Uniform
from evopress.util.errors import ArtifactError
from evopress.workflow.searches import with_exports

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
WHERE = "searches.s.exports"
SEARCH = Evolution(variants="v", target=5)


def write_model(run: Run, kind: str, dtype: torch.dtype, **more: object) -> pd.DataFrame:
    """A model whose layers have room for groups of 128, and the table of its layers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.save_pretrained(run.model)
    tokenizer().save_pretrained(run.model)
    source = {"source": "folder", "path": "tiny"}
    run.model_manifest.write_text(json.dumps({"fingerprint": "f" * 64, "source": source, "origin": {}}))
    layers = layer_table(BlockwiseModel.from_folder(run.model, torch.device("cpu")).model)
    write_table(layers, run.layers, LAYERS, provenance())
    return layers


def write_search(run: Run, layers: pd.DataFrame, method: Gptq | Gguf, chosen: dict[str, str]) -> None:
    """Variants of all layers, and a configuration with ``chosen`` levels by the last part of a layer's name.

    Layers that it does not name stay dense.
    """
    rows = []
    weights = Checkpoint(run.model).read([f"{name}.weight" for name in layers["name"]], dtype=torch.float32)
    for block, own in layers.groupby("block"):
        made = [
            variant
            for row in own.itertuples()
            for variant in method.compress({row.layer: weights[f"{row.name}.weight"]}, torch.eye(row.columns))
        ]
        table = variant_table(made, own, method)
        write_variants(run, "v", int(block), made, table, variants_provenance(StageContext(run), method), {})
        for name, offered in table.groupby("name", sort=False):
            if level := chosen.get(str(name).rpartition(".")[2]):
                rows.append({**offered[offered["level"] == level].iloc[0].to_dict(), "unit": name, "variants": "v"})
    settings = {"strategy": "evolution", "target": 5.0, "variants": "v"}
    write_table(pd.DataFrame(rows), run.configuration("s"), CONFIGURATION, provenance(settings))


def everywhere(layers: pd.DataFrame, *levels: str) -> dict[str, str]:
    """Levels by turns; fused layers have the same."""
    kinds = list(dict.fromkeys(layers["name"].str.rpartition(".")[2]))
    fused = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    own = [kind for kind in kinds if kind not in fused]
    found = {kind: levels[number % len(levels)] for number, kind in enumerate(own)}
    return found | {kind: found[first] for kind, first in fused.items() if kind in kinds}


def exported(run: Run, exporter: CompressedTensors | None = None) -> Path:
    context = StageContext(run, COMPUTE)
    run_export(context, "s", HuggingFace())
    run_export(context, "s", exporter or CompressedTensors())
    return run.export("s", "compressed_tensors")


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(tokens(2, LENGTH)).logits


def problems(exporter: CompressedTensors, method: Method, strategy: Strategy = SEARCH) -> list[str]:
    return list(exporter.problems(WHERE, method, strategy))


@pytest.mark.parametrize("patterns", [(), ("2:4",)])
def test_sparse_integers_are_refused_with_what_holds_them(patterns: tuple[str, ...]) -> None:
    (found,) = problems(CompressedTensors(), SparseGpt(bits=4, patterns=patterns))
    assert "are sparse, for which neither the library nor vLLM has a format any more" in found
    assert "`archive`" in found


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("symmetric", "levels"), [(True, ("4", "8")), (False, ("4",))])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_the_folder_computes_what_the_search_judged(
    group: int | None, symmetric: bool, levels: tuple[str, ...], tmp_path: Path
) -> None:
    """Exactly: readers multiply codes of at most 8 bits by scales that the model's type holds, and round once."""
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    method = Gptq(bits=(4, 8), group_size=group, symmetric=symmetric, scale_dtype="bfloat16")
    write_search(run, layers, method, everywhere(layers, *levels))
    folder = exported(run)
    assert torch.equal(logits(folder), logits(run.export("s", "huggingface")))
    assert not torch.equal(logits(folder), logits(run.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float16_scales_are_exact_in_models_of_these_types(dtype: torch.dtype, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", dtype, tie_word_embeddings=True)
    write_search(run, layers, Gptq(bits=(4, 8), group_size=64, symmetric=True), everywhere(layers, "8", "4"))
    assert torch.equal(logits(exported(run)), logits(run.export("s", "huggingface")))


def test_scales_that_the_model_does_not_hold_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    write_search(run, layers, Gptq(bits=(4,), group_size=64, symmetric=True), everywhere(layers, "4"))
    with pytest.raises(
        ArtifactError, match=r"_proj\.weight: its scales \(float16\) are not exact in bfloat16.*set `sca"
    ):
        exported(run)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen3", "Gemma3Text"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, kind, torch.bfloat16, head_dim=32)
    method = Gptq(bits=(4, 8), group_size=128, symmetric=True, scale_dtype="bfloat16")
    write_search(run, layers, method, everywhere(layers, "8", "4"))
    assert torch.equal(logits(exported(run)), logits(run.export("s", "huggingface")))


def test_fused_layers_of_the_model_itself_need_no_ties(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Phi3", torch.bfloat16)
    method = Gptq(bits=(4, 8), group_size=32, symmetric=True, scale_dtype="bfloat16")
    write_search(run, layers, method, everywhere(layers, "4", "8"))
    folder = exported(run)
    assert torch.equal(logits(folder), logits(run.export("s", "huggingface")))
    first, second = config_of(folder)["config_groups"].values()
    assert first["targets"] == [
        f"model.layers.{n}.{k}" for n in range(2) for k in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    assert [first["weights"]["num_bits"], second["weights"]["num_bits"]] == [4, 8]


def test_the_config_names_every_linear_layer_once(tmp_path: Path) -> None:
    """vLLM raises where a layer is neither a target nor ignored."""
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    method = Gptq(bits=(4, 8), group_size=64, symmetric=True, scale_dtype="bfloat16")
    write_search(run, layers, method, everywhere(layers, "4", "8") | {"down_proj": ""})
    folder = exported(run, CompressedTensors(shard_bytes=60_000))
    assert torch.equal(logits(folder), logits(run.export("s", "huggingface")))
    config = config_of(folder)
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert config["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    named = [name for group in config["config_groups"].values() for name in group["targets"]] + config["ignore"]
    assert sorted(named) == sorted([*layers["name"], "lm_head"])
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False}
    assert config["config_groups"]["group_0"]["weights"] == scheme and "dequantize" not in config
    stored = Checkpoint(folder)
    assert len(stored.files) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(stored.sizes().values())


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_package(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (300, 77), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    signed = (codes.short() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), helpers.pack_to_int32(signed, bits))
    by_rows = pack_words(codes.t().contiguous(), bits).t()
    assert torch.equal(by_rows, helpers.pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_transformers_takes_other_widths_and_mixes_within_fused_layers(bits: int, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    method = Gptq(bits=(bits, 8), group_size=32, symmetric=True, scale_dtype="bfloat16")
    chosen = everywhere(layers, str(bits), "8") | {"k_proj": "8", "q_proj": str(bits)}
    write_search(run, layers, method, chosen)
    with pytest.raises(ArtifactError, match=f"q_proj: vLLM has no kernel for {bits} bits in groups of 32 without zero"):
        exported(run)
    folder = exported(run, CompressedTensors(runtime="transformers"))
    assert torch.equal(logits(folder), logits(run.export("s", "huggingface")))


def test_what_vllm_would_fuse_must_be_at_one_level(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    method = Gptq(bits=(4, 8), group_size=32, symmetric=True, scale_dtype="bfloat16")
    for other in ("8", ""):  # at another level, and dense
        write_search(run, layers, method, everywhere(layers, "4") | {"v_proj": other})
        with pytest.raises(
            ArtifactError, match=r"q_proj and model\.layers\.0\.self_attn\.v_proj are not at the same level"
        ):
            exported(run)


def test_layers_of_sizes_that_the_kernel_does_not_take_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16, hidden_size=64)
    method = Gptq(bits=(4,), group_size=64, symmetric=True, scale_dtype="bfloat16")
    write_search(run, layers, method, everywhere(layers, "4"))
    with pytest.raises(ArtifactError, match=r"q_proj: is 64 x 64, and .* inputs in multiples of 128; exclude"):
        exported(run)
    folder = exported(run, CompressedTensors(runtime="transformers"))
    assert torch.equal(logits(folder), logits(run.export("s", "huggingface")))


def test_several_widths_with_zero_points_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    write_search(run, layers, Gptq(bits=(3, 4), group_size=32, scale_dtype="bfloat16"), everywhere(layers, "3", "4"))
    with pytest.raises(ArtifactError, match="zero points only where all layers have one bit-width"):
        exported(run, CompressedTensors(runtime="transformers"))


def test_levels_that_the_format_cannot_hold_are_refused_by_the_settings() -> None:
    vllm, plain = CompressedTensors(), CompressedTensors(runtime="transformers")
    assert problems(vllm, Gguf()) == [
        f"{WHERE}: compressed_tensors holds integers with scales, which 'v' are not; use `method: gptq`"
    ]
    (group,) = problems(vllm, Gptq(bits=(4, 8), group_size=16, symmetric=True))
    assert "groups of 32, 64 or 128 inputs, or none (null), and 'v' has `group_size: 16`" in group
    (bits,) = problems(vllm, Gptq(bits=(2, 3)))
    assert "of the bit-widths of 'v' (2, 3), vLLM's kernels have none; make variants at 4 bits" in bits
    (zeros,) = problems(plain, Gptq(bits=(2, 3)))
    assert "zero points only where all layers have one bit-width; set `symmetric: true` in 'v'" in zeros
    for exporter, method in ((vllm, Gptq(bits=(4, 8), symmetric=True)), (plain, Gptq(bits=(2, 3), symmetric=True))):
        assert not problems(exporter, method)
    assert not problems(plain, Gptq(bits=(2, 3)), Uniform(variants="v", target=3))


def test_levels_and_ties_are_those_of_the_runtime() -> None:
    vllm, plain = CompressedTensors(), CompressedTensors(runtime="transformers")
    assert vllm.levels(Gptq(bits=(3, 4, 8), symmetric=True)) == ("4", "8")
    assert vllm.levels(Gptq(bits=(3, 4, 8))) == ("4",)
    assert plain.levels(Gptq(bits=(3, 4, 8))) is None and plain.ties() == ()
    assert vllm.ties() == (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def test_what_a_search_finds_for_it_can_be_written(tmp_path: Path) -> None:
    """From settings to a folder: the export ties layers and takes levels out, and so can write what is found."""
    run = Run(tmp_path / "run")
    layers = write_model(run, "Llama", torch.bfloat16)
    method = Gptq(bits=(3, 4, 8), group_size=64, symmetric=True, scale_dtype="bfloat16")
    write_search(run, layers, method, everywhere(layers, "3"))
    write_tokens(run, "search", sequences=6)
    found = {"generations": 3, "offspring": 4, "survivors": (1,), "tokens": (24,), "initial_tokens": 12, "seed": 1}
    asking = Evolution(variants="v", target=5, group_rule="none", exports=("compressed_tensors",), **found)
    strategy = with_exports(asking, {"v": method}, "searches.s")
    run_search(StageContext(run, COMPUTE), "s", strategy)
    levels = Configuration.read(run, "s").table["level"]
    assert set(levels) == {"4", "8"} and list(levels.iloc[:3]) == [levels.iloc[0]] * 3
    folder = exported(run)
    assert torch.equal(logits(folder), logits(run.export("s", "huggingface")))
    write_card(StageContext(run), "s", CompressedTensors())
    card = run.card("s", "compressed_tensors").read_text()
    assert f"vllm serve {folder.as_posix()}" in card and "`pack-quantized` of compressed-tensors" in card
    assert "base_model_relation" not in card  # a folder of its own has no base model on the hub


def test_the_card_says_how_to_run_it() -> None:
    assert "vllm serve results/x" in CompressedTensors().usage("results/x")
    plain = CompressedTensors(runtime="transformers").usage("results/x")
    assert "vllm" not in plain and 'from_pretrained("results/x")' in plain and "pip install compressed-tensors" in plain
