"""The Hugging Face folder: loads anywhere, and holds exactly the weights that the search judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finished_run import BLOCKS, FINGERPRINT, make_results, tiny_model, write_configuration, write_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from evopress.artifacts.exports import read_export_manifest
from evopress.artifacts.paths import HUGGINGFACE, Run
from evopress.artifacts.provenance import read_model_fingerprint
from evopress.compression.hessian import accumulate_hessians
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import HessianSettings
from evopress.config.model import FolderModel
from evopress.export import compressed
from evopress.export.exporters.huggingface import SHARD_BYTES, HuggingFace
from evopress.export.folder import companion_files, plan_shards, shard_names
from evopress.export.stage import run_export
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import Checkpoint
from evopress.models.sources import prepare_model
from evopress.util.errors import ArtifactError

LOAD_ELSEWHERE = """
import sys
sys.modules["evopress"] = None  # importing it now fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, tokens, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model(load_file(tokens)["tokens"], use_cache=False).logits}, logits)
"""


def export(results: Run, search: str, **settings: int) -> None:
    run_export(StageContext(results), search, HuggingFace(**settings))


class RoundedStore:
    """Variants that are the dense weights rounded to a step which the level sets."""

    def __init__(self, results, name, *, verify=False, polished=None):
        assert name == "gptq"
        self.checkpoint = Checkpoint(results.model)

    def weight(self, block, layer, level, device, dtype):
        name = f"model.layers.{block}.{layer}.weight"
        step = 2.0 ** -int(level)
        return ((self.checkpoint.read([name])[name].float() / step).round() * step).to(device, dtype)


@pytest.fixture
def rounded(monkeypatch):
    monkeypatch.setattr(compressed, "VariantStore", RoundedStore)


def _logits_elsewhere(folder: Path, tokens: torch.Tensor, scratch: Path) -> torch.Tensor:
    """Logits from a process of its own, in which evopress cannot be imported."""
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    arguments = [folder, scratch / "tokens.safetensors", scratch / "logits.safetensors"]
    done = subprocess.run([sys.executable, "-I", "-c", LOAD_ELSEWHERE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(scratch / "logits.safetensors")["logits"]


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 3000])
def test_loads_without_our_code_and_gives_the_logits_that_the_search_saw(tmp_path, rounded, shard_bytes):
    results = make_results(tmp_path)
    configuration = write_configuration(results, "evo")
    tokens = write_tokens(results, "search")
    export(results, "evo", shard_bytes=shard_bytes)

    model = BlockwiseModel.from_folder(results.model, torch.device("cpu"))
    store = RoundedStore(results, "gptq")
    hidden, inputs = model.embed(tokens)
    for block, rows in configuration.groupby("block"):
        weights = {
            row.layer: store.weight(block, row.layer, row.level, model.device, model.dtype) for row in rows.itertuples()
        }
        hidden = model.run_block(block, hidden, inputs, weights)
    seen = model.logits(hidden)

    assert torch.equal(_logits_elsewhere(results.export("evo", HUGGINGFACE), tokens, tmp_path), seen)
    with torch.no_grad():
        assert not torch.allclose(tiny_model()(tokens).logits, seen, atol=1e-2)


def test_stored_weights_are_those_of_the_real_variants(tmp_path):
    tiny = make_results(tmp_path / "original", dtype=torch.bfloat16)
    results = Run(tmp_path / "run")
    prepare_model(FolderModel(path=str(tiny.model)), results)
    write_tokens(results, "calibration", sequences=8, fingerprint=read_model_fingerprint(results))
    accumulate_hessians(StageContext(results, ComputeSettings(device="cpu")), HessianSettings(), 0)
    settings = Gptq(bits=(2, 3, 4), group_size=8)
    for block in range(BLOCKS):
        make_variants(StageContext(results, ComputeSettings(device="cpu")), "gptq", settings, [block])
    configuration = write_configuration(results, "evo", fingerprint=read_model_fingerprint(results))
    export(results, "evo")

    store, stored = VariantStore(results, "gptq"), Checkpoint(results.export("evo", HUGGINGFACE))
    dense = Checkpoint(results.model)
    for row in configuration.itertuples():
        name = f"{row.unit}.weight"
        weight = stored.read([name])[name]
        assert torch.equal(weight, store.weight(row.block, row.layer, row.level, dtype=torch.bfloat16))
        assert len(weight[0, :8].unique()) <= 2 ** int(row.level)
        assert not torch.equal(weight, dense.read([name])[name])


@pytest.mark.parametrize(("dtype", "tied"), [(torch.bfloat16, True), (torch.float32, False)])
def test_keeps_type_ties_and_every_other_tensor(tmp_path, rounded, dtype, tied):
    results = make_results(tmp_path, dtype=dtype, tied=tied)
    configuration = write_configuration(results, "evo")
    export(results, "evo")
    before, after = Checkpoint(results.model), Checkpoint(results.export("evo", HUGGINGFACE))
    assert after.names() == before.names() and ("lm_head.weight" in after.names()) is not tied
    searched = {f"{unit}.weight" for unit in configuration["unit"]}
    old, new = before.read(before.names()), after.read(after.names())
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == searched
    with safe_open(results.export("evo", HUGGINGFACE) / "model.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}


def test_companions_are_the_same_bytes_and_weights_or_cards_of_the_original_stay_behind(tmp_path, rounded):
    results = make_results(tmp_path)
    for name in ("README.md", "LICENSE", "pytorch_model.bin", "model.gguf", ".gitattributes"):
        (results.model / name).write_text(name)
    (results.model / "original").mkdir()
    (results.model / "original" / "consolidated.pth").write_text("pickle")
    write_configuration(results, "evo")
    export(results, "evo")
    folder = results.export("evo", HUGGINGFACE)
    kept = {path.as_posix() for path in companion_files(results.model)}
    assert kept == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in kept:
        assert (folder / name).read_bytes() == (results.model / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == kept | {"model.safetensors"}
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"


def test_a_linked_model_is_copied_not_linked(tmp_path, rounded):
    results = make_results(tmp_path)
    results.model.rename(tmp_path / "elsewhere")
    results.model.mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (results.model / path.name).symlink_to(path)
    write_configuration(results, "evo")
    export(results, "evo")
    assert not any(path.is_symlink() for path in results.export("evo", HUGGINGFACE).rglob("*"))


def test_manifest_tells_of_damage_and_of_another_model(tmp_path, rounded):
    results = make_results(tmp_path)
    write_configuration(results, "evo")
    export(results, "evo")
    manifest = read_export_manifest(results, "evo", HUGGINGFACE)
    assert manifest["provenance"]["model"] == FINGERPRINT and "model.safetensors" in manifest["files"]
    weights = results.export("evo", HUGGINGFACE) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged \(holds \d+ bytes instead of \d+\)"):
        read_export_manifest(results, "evo", HUGGINGFACE)
    weights.write_bytes(whole)
    results.model_manifest.write_text(json.dumps({"fingerprint": "e" * 64}))
    with pytest.raises(ArtifactError, match="was made for another model"):
        read_export_manifest(results, "evo", HUGGINGFACE)


def test_a_name_with_dots_keeps_its_own_manifest(tmp_path, rounded):
    results = make_results(tmp_path)
    for search in ("q3.0", "q3.5"):
        write_configuration(results, search)
        export(results, search)
    assert read_export_manifest(results, "q3.0", HUGGINGFACE)["search"] == "q3.0"
    assert read_export_manifest(results, "q3.5", HUGGINGFACE)["search"] == "q3.5"


def test_configuration_of_another_model_is_refused(tmp_path, rounded):
    results = make_results(tmp_path)
    write_configuration(results, "evo", fingerprint="e" * 64)
    with pytest.raises(ArtifactError, match="was made for another model"):
        export(results, "evo")
    assert not results.export("evo", HUGGINGFACE).exists()


def test_a_failing_variant_leaves_nothing_behind(tmp_path, monkeypatch):
    class Broken(RoundedStore):
        def weight(self, block, layer, level, device, dtype):
            if block == 1:
                raise ArtifactError("variant is damaged")
            return super().weight(block, layer, level, device, dtype)

    monkeypatch.setattr(compressed, "VariantStore", Broken)
    results = make_results(tmp_path)
    write_configuration(results, "evo")
    with pytest.raises(ArtifactError, match="variant is damaged"):
        export(results, "evo")
    assert list((results.root / "exports" / "evo").iterdir()) == []


def test_variant_of_another_shape_is_refused(tmp_path, monkeypatch):
    class Transposed(RoundedStore):
        def weight(self, *arguments):
            return super().weight(*arguments)[:-1]

    monkeypatch.setattr(compressed, "VariantStore", Transposed)
    results = make_results(tmp_path)
    write_configuration(results, "evo")
    with pytest.raises(ArtifactError, match=r"block 0 mlp.down_proj level 2 is \[15, 24\], .*\[16, 24\]"):
        export(results, "evo")


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([4, 9, 1], 8, [[0], [1], [2]]),
        ([9], 8, [[0]]),
        ([1, 2, 3], 100, [[0, 1, 2]]),
    ],
)
def test_shards_are_filled_in_order_up_to_the_limit(sizes, limit, shards):
    names = {f"t{number}": size for number, size in enumerate(sizes)}
    assert plan_shards(names, limit) == [[f"t{number}" for number in shard] for shard in shards]


def test_shard_names_are_those_of_the_hub():
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
