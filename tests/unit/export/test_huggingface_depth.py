"""Models without some of their modules: plain transformers loads them, and they give what the search judged."""

import json

import pandas as pd
import pytest
import torch
from architectures import CONFIGS, build, tokens
from depth_run import without, write_depth_configuration, write_depth_model
from transformers import AutoModelForCausalLM

from evopress.artifacts.paths import HUGGINGFACE, Run
from evopress.config.context import StageContext
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.shorter import write_cut_config
from evopress.export.stage import run_export
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import Checkpoint
from evopress.util.errors import ArtifactError, UnsupportedArchitectureError

FIRST_GONE = {(0, "attn"), (0, "mlp")}
MIXED = {(0, "attn"), (1, "attn"), (1, "mlp"), (2, "mlp")}
CPU = torch.device("cpu")


def _exported(tmp_path, model, dropped, **options):
    results = Run(tmp_path / "run")
    write_depth_model(results, model)
    write_depth_configuration(results, "evo", dropped, **options)
    run_export(StageContext(results), "evo", HuggingFace())
    return results


def _load(results):
    return AutoModelForCausalLM.from_pretrained(results.export("evo", HUGGINGFACE), dtype=torch.float32).eval()


def _generate(model, ids, *, use_cache):
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


@pytest.mark.parametrize("dropped", [FIRST_GONE, MIXED], ids=["first-gone", "mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gives_the_logits_of_the_whole_model_with_those_modules_silenced(tmp_path, name, dropped):
    model = build(name)
    results = _exported(tmp_path, model, dropped)
    loaded = _load(results)
    assert loaded.config.num_hidden_layers == 2
    ids = tokens()
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with without(model, dropped):
            expected = model(ids, use_cache=False).logits
            greedy = _generate(model, ids[:1], use_cache=False)
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
        assert not torch.allclose(dense, expected, atol=1e-2)
        assert torch.equal(_generate(loaded, ids[:1], use_cache=True), greedy)


@pytest.mark.parametrize("name", CONFIGS)
def test_gives_the_logits_that_the_engine_judged(tmp_path, name):
    model = build(name)
    results = _exported(tmp_path, model, MIXED)
    dense = BlockwiseModel.from_folder(results.model, CPU)
    hidden, inputs = dense.embed(tokens())
    for block in range(3):
        hidden = dense.run_block(block, hidden, inputs, absent={kind for number, kind in MIXED if number == block})
    exported = BlockwiseModel.from_folder(results.export("evo", HUGGINGFACE), CPU, resident=False)
    assert len(exported.blocks) == 2
    own, inputs = exported.embed(tokens())
    for block in range(2):
        exported.load_block(block)
        own = exported.run_block(block, own, inputs)
    assert torch.equal(exported.logits(own), dense.logits(hidden))


def test_what_is_gone_is_not_stored_and_later_blocks_take_its_number(tmp_path):
    results = _exported(tmp_path, build("qwen2"), MIXED)
    dense, exported = Checkpoint(results.model), Checkpoint(results.export("evo", HUGGINGFACE))
    assert {name for name in dense.names() if ".layers.2." not in name} == set(exported.names())
    old, new = dense.read(dense.names()), exported.read(exported.names())
    numbers = {"0": "0", "1": "2"}
    for name, tensor in new.items():
        before = old[".".join(numbers.get(part, part) for part in name.split("."))]
        silent = name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")
        assert torch.equal(tensor, torch.zeros_like(before) if silent else before), name


def test_output_biases_are_zeros_too(tmp_path):
    results = _exported(tmp_path, build("opt"), {(0, "mlp"), (2, "attn")})
    exported = Checkpoint(results.export("evo", HUGGINGFACE))
    tensors = exported.read(exported.names())
    silent = {name for name, tensor in tensors.items() if not tensor.any()}
    assert {name.partition("layers.")[2] for name in silent} == {
        f"{layer}.{part}" for layer in ("0.fc2", "2.self_attn.out_proj") for part in ("weight", "bias")
    }
    assert exported.names() == Checkpoint(results.model).names()


def test_rules_by_index_are_written_out_as_lists(tmp_path):
    results = _exported(tmp_path, build("qwen2-sliding"), FIRST_GONE)
    config = json.loads((results.export("evo", HUGGINGFACE) / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 2  # max_window_layers alone would make the first one full
    assert config["num_hidden_layers"] == 2 and config["max_window_layers"] == 1


def test_other_settings_of_the_config_stay_as_they_were(tmp_path):
    results = _exported(tmp_path, build("gemma3"), FIRST_GONE)
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (results.model, results.export("evo", HUGGINGFACE))
    )
    assert {key for key in before if before[key] != after[key]} == {"num_hidden_layers", "layer_types"}
    assert after["layer_types"] == before["layer_types"][1:] and before.keys() == after.keys()


def test_a_list_of_token_ids_as_long_as_the_model_is_not_cut(tmp_path):
    model = build("llama")
    model.config.eos_token_id = [2, 5, 7]
    results = _exported(tmp_path, model, FIRST_GONE)
    assert json.loads((results.export("evo", HUGGINGFACE) / "config.json").read_text())["eos_token_id"] == [2, 5, 7]


def test_a_block_that_depends_on_its_number_is_refused_by_name(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.__init__

    def scaled_by_number(self, config, layer_idx):
        original(self, config, layer_idx)
        self.scaling /= layer_idx + 1

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", scaled_by_number)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"block 1 would not be the same as block 0.*self_attn.scaling"
    ):
        _exported(tmp_path, build("llama"), FIRST_GONE)
    assert list((tmp_path / "run" / "exports" / "evo").iterdir()) == []


def test_modules_that_the_search_left_out_stay(tmp_path):
    results = Run(tmp_path / "run")
    write_depth_model(results, build("llama"))
    frame = write_depth_configuration(results, "evo", {(1, "attn")}, excluded={(1, "mlp"), (0, "attn"), (0, "mlp")})
    assert len(frame) == 3
    run_export(StageContext(results), "evo", HuggingFace())
    assert len(_load(results).model.layers) == 3


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ({(block, kind) for block in range(3) for kind in ("attn", "mlp")}, "drops every block"),
        ({(0, "attn"), (7, "mlp")}, "mlp of block 7 is no module"),
    ],
)
def test_impossible_configurations_are_refused(tmp_path, dropped, message):
    from evopress.compression.dropped import dropped_modules

    results = Run(tmp_path / "run")
    write_depth_model(results, build("llama"))
    frame = write_depth_configuration(results, "evo", dropped)
    strange = [("x", block, kind, "d", "modules", "drop", 1.0, 0, 1, 0) for block, kind in dropped if block > 2]
    frame = pd.concat([frame, pd.DataFrame(strange, columns=frame.columns)])
    with pytest.raises(ArtifactError, match=message):
        dropped_modules(frame, pd.read_parquet(results.layers))


def test_modules_and_layers_of_one_configuration_both_count(tmp_path, monkeypatch):
    from finished_run import provenance

    from evopress.artifacts.tables import CONFIGURATION, write_table
    from evopress.export import compressed

    class Halved:
        def __init__(self, results, name, *, verify=False, polished=None):
            self.checkpoint = Checkpoint(results.model)

        def weight(self, block, layer, level, device, dtype):
            name = f"model.layers.{block}.{layer}.weight"
            return self.checkpoint.read([name])[name] / 2

    monkeypatch.setattr(compressed, "VariantStore", Halved)
    results = Run(tmp_path / "run")
    write_depth_model(results, build("llama"))
    frame = write_depth_configuration(results, "evo", MIXED)
    layers = pd.read_parquet(results.layers)
    rows = [
        (row.name, row.block, row.layer, "gptq", "bits", "3", 3.0, 3, 1, 1) for row in layers.itertuples(index=False)
    ]
    both = pd.concat([frame, pd.DataFrame(rows, columns=frame.columns)])
    write_table(both, results.configuration("evo"), CONFIGURATION, provenance())
    run_export(StageContext(results), "evo", HuggingFace())
    old, new = Checkpoint(results.model), Checkpoint(results.export("evo", HUGGINGFACE))
    read = {name: new.read([name])[name] for name in new.names()}
    assert not read["model.layers.0.self_attn.o_proj.weight"].any()
    for name, before in (("0.mlp.up_proj", "0.mlp.up_proj"), ("1.self_attn.k_proj", "2.self_attn.k_proj")):
        dense = f"model.layers.{before}.weight"
        assert torch.equal(read[f"model.layers.{name}.weight"], old.read([dense])[dense] / 2)


def test_a_checkpoint_of_several_shards_has_an_index_of_what_is_left(tmp_path):
    results = Run(tmp_path / "run")
    write_depth_model(results, build("llama"))
    write_depth_configuration(results, "evo", FIRST_GONE)
    run_export(StageContext(results), "evo", HuggingFace(shard_bytes=20_000))
    index = json.loads((results.export("evo", HUGGINGFACE) / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(Checkpoint(results.export("evo", HUGGINGFACE)).names())
    assert index["metadata"]["total_size"] == sum(Checkpoint(results.export("evo", HUGGINGFACE)).sizes().values())
    assert len(_load(results).model.layers) == 2


def test_the_text_section_of_a_larger_config_is_cut(tmp_path):
    text = {"num_hidden_layers": 6, "sliding_window_pattern": 3, "hidden_size": 32, "vocab_size": 96}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"num_hidden_layers": 6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "cut").mkdir()
    write_cut_config(tmp_path, tmp_path / "cut", [0, 2, 5])
    cut = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert cut["text_config"]["num_hidden_layers"] == 3 and cut["vision_config"] == config["vision_config"]
    assert cut["text_config"]["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]


def test_an_own_name_for_the_number_of_layers_is_set(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj", "n_layer": 5}))
    (tmp_path / "cut").mkdir()
    write_cut_config(tmp_path, tmp_path / "cut", [1, 4])
    assert json.loads((tmp_path / "cut" / "config.json").read_text()) == {"model_type": "gptj", "n_layer": 2}
