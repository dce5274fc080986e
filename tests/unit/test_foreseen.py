"""What a dry run tells of settings that jobs would refuse, and what it leaves to them."""

import json
from pathlib import Path

import pytest
import torch
from architectures import build
from finished_run import make_results
from large_models import SHAPES, write_settings
from tiny_sources import gguf_file

from evopress.artifacts.paths import Run
from evopress.export.exporters.gguf import MODEL_TYPES
from evopress.export.gguf.layouts import LAYOUTS
from evopress.models.config_file import source_bytes
from evopress.models.structure import layer_table
from evopress.util.errors import ConfigError
from evopress.workflow.foreseen import known_layers, require_fit
from evopress.workflow.settings import Settings, load_settings

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    **{k: v for k, v in SHAPES["7B"].items() if k != "num_hidden_layers"},
}


def settings_with(folder, variants=None, **sections) -> Settings:
    if variants is None:
        return load_settings([write_settings(folder, "7B", **sections)])
    return load_settings([write_settings(folder, "7B", variants={"v": variants}, searches={}, **sections)])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_known_layers_are_those_of_the_model(name):
    model = build(name)
    with torch.no_grad():
        table = layer_table(model)
    config = model.config.to_dict()
    found = [(layer.name, layer.rows, layer.columns) for layer in known_layers(config)]
    assert found == list(table[["name", "rows", "columns"]].itertuples(index=False, name=None))


@pytest.mark.parametrize(
    "change", [{"model_type": "mamba"}, {"num_experts": 8}, {"auto_map": {}}, {"hidden_size": "x"}]
)
def test_of_other_models_nothing_is_foreseen(tmp_path, change):
    settings = settings_with(tmp_path, {"method": "gptq", "group_size": 7, "exclude": ["nothing"]})
    assert known_layers(LLAMA | change) == []
    require_fit(settings, LLAMA | change)
    require_fit(settings, {})


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            {"method": "gptq", "group_size": 7},
            r"^variants\.v: model\.layers\.0\.self_attn\.q_proj: group_size 7 does not",
        ),
        (
            {"method": "gptq", "group_size": 128, "exclude": ["*.ffn"]},
            r"^variants\.v\.exclude: '\*\.ffn' matches no layer",
        ),
        ({"method": "wanda", "exclude": ["*.ffn"]}, r"^variants\.v\.exclude: '\*\.ffn' matches no layer"),
        (
            {"method": "drop", "exclude": ["*.self_attn"]},
            r"matches no module; names look like 'model\.layers\.0\.attn'",
        ),
    ],
)
def test_variants_that_do_not_fit_are_refused(tmp_path, variants, message):
    with pytest.raises(ConfigError, match=message):
        require_fit(settings_with(tmp_path, variants), LLAMA)


@pytest.mark.parametrize(
    "variants",
    [
        {"method": "gptq", "group_size": 128, "exclude": ["*.down_proj"]},
        {"method": "gptq", "group_size": 4096, "exclude": ["*.down_proj"]},  # which it does not divide
        {"method": "drop", "exclude": ["*.layers.0.attn", "*.mlp"]},
    ],
)
def test_variants_that_fit_pass(tmp_path, variants):
    require_fit(settings_with(tmp_path, variants), LLAMA)


def sized(folder: Path, model: dict, target: dict) -> Settings:
    folder.mkdir()
    variants = {"v": {"method": "gptq", "bits": [3, 4], "group_size": 8}}
    search = {"strategy": "uniform", "variants": "v", "target": target}
    return load_settings([write_settings(folder, "7B", model=model, variants=variants, searches={"s": search})])


def test_a_size_that_no_layers_fit_into_is_refused(tmp_path):
    model = {"source": "folder", "path": str(tmp_path)}
    parameters = sum(layer.rows * layer.columns for layer in known_layers(LLAMA))
    least = parameters * 3 // 8
    with pytest.raises(ConfigError, match=r"^searches\.s\.target: .* is below what the linear layers alone take at"):
        require_fit(sized(tmp_path / "small", model, {"bytes": least}), LLAMA)  # scales take some more
    for name, target in (("large", {"bytes": 2 * least}), ("share", {"fraction": 0.001})):
        require_fit(sized(tmp_path / name, model, target), LLAMA)


def test_a_size_that_is_not_below_a_gguf_source_is_refused_before_anything_runs(tmp_path):
    path = gguf_file(tmp_path / "model.gguf", build("llama"))
    model, source = {"source": "gguf", "path": str(path)}, path.stat().st_size
    refused = [{"bytes": source}, {"bpw": 40}]  # the file holds float32
    for number, target in enumerate(refused):
        with pytest.raises(ConfigError, match=r"^searches\.s\.target: .* is not below the quantized file"):
            require_fit(sized(tmp_path / str(number), model, target), {})
    for number, target in enumerate([*(one | {"above_source": True} for one in refused), {"bytes": source - 1}], 2):
        require_fit(sized(tmp_path / str(number), model, target), {})
    path.write_bytes(b"damaged")  # which the job that reads it says
    require_fit(sized(tmp_path / "damaged", model, refused[0]), {})


def test_the_source_of_a_wheel_is_known_once_it_is_prepared(tmp_path):
    model = {"source": "pypi", "package": "p", "version": "1", "sha256": "0" * 64, "file": "m.gguf"}
    settings, run = sized(tmp_path / "settings", model, {"fraction": 0.5}), make_results(tmp_path)
    manifest = {"source": json.loads(settings.model.model_dump_json()), "origin": {"gguf_bytes": 5000}}
    require_fit(settings, {}, run)  # its model is another
    run.model_manifest.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"from \(0\.005 MB\), which is the dense model here"):
        require_fit(settings, {}, run)
    assert source_bytes(settings.model, Run(tmp_path / "none")) is None


def test_a_text_that_is_surely_too_short_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("abc" * 100)
    text = {"source": "file", "path": str(tmp_path / "short.txt"), "sequence_length": 64}
    fine, short = text | {"tokens": 256}, text | {"tokens": 512}
    for tokens, problem in ((fine, None), (short, "data.evaluation.held: .*short.txt holds fewer than 512 tokens")):
        (tmp_path / str(tokens["tokens"])).mkdir()
        data = {"calibration": fine, "search": fine, "evaluation": {"held": tokens}}
        settings = settings_with(tmp_path / str(tokens["tokens"]), {"method": "gptq", "group_size": 128}, data=data)
        if problem:
            with pytest.raises(ConfigError, match=problem):
                require_fit(settings, {})
        else:
            require_fit(settings, {})


# --- exports ---------------------------------------------------------------------------------------------------------

PACKED = {"method": "gptq", "bits": [4, 8], "group_size": 128, "symmetric": True, "scale_dtype": "bfloat16"}


def exporting(folder, variants, runtime="vllm", dtype="source") -> Settings:
    export = {"exporter": "compressed_tensors", "runtime": runtime}
    search = {"strategy": "uniform", "variants": "v", "target": 4, "exports": [export]}
    path = write_settings(folder, "7B", variants={"v": {**PACKED, **variants}}, searches={"s": search})
    settings = load_settings([path])
    return settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": dtype})})


@pytest.mark.parametrize(
    ("variants", "config", "message"),
    [
        (
            {"scale_dtype": "float16"},
            {"dtype": "bfloat16"},
            r"^searches\.s\.exports: the model is bfloat16, and its readers would round scales of float16",
        ),
        ({"scale_dtype": "float16"}, {"torch_dtype": "bfloat16"}, r"set `scale_dtype: bfloat16` in the variants$"),
        (
            {"exclude": ["*.1.self_attn.k_proj"]},
            {},
            r"layers\.1\.self_attn\.k_proj is excluded and model\.layers\.1\.self_attn\.q_proj is not",
        ),
        (
            {"group_size": 32},
            {"intermediate_size": 11008 - 32},
            r"^searches\.s\.exports: .*gate_proj: is 10976 x 4096, and vLLM's kernel \(Marlin\) takes outputs in mult",
        ),
    ],
)
def test_models_that_an_export_cannot_hold_are_refused(tmp_path, variants, config, message):
    with pytest.raises(ConfigError, match=message):
        require_fit(exporting(tmp_path, variants), LLAMA | config)


@pytest.mark.parametrize(
    ("variants", "config", "runtime", "dtype"),
    [
        ({}, {"dtype": "bfloat16"}, "vllm", "source"),
        ({"scale_dtype": "float16"}, {"dtype": "bfloat16"}, "vllm", "float16"),
        ({"scale_dtype": "float16"}, {"dtype": None}, "vllm", "source"),  # which nothing tells
        ({"exclude": ["*.layers.1.self_attn.*"]}, {}, "vllm", "source"),
        ({"exclude": ["*.k_proj"], "group_size": 32}, {"intermediate_size": 10976}, "transformers", "source"),
    ],
)
def test_models_that_it_can_hold_pass(tmp_path, variants, config, runtime, dtype):
    require_fit(exporting(tmp_path, variants, runtime, dtype), LLAMA | config)


def test_a_runtime_that_is_not_installed_is_told_beforehand(tmp_path, monkeypatch):
    exports = [{"exporter": "gguf", "dequantize": True}]
    search = {"strategy": "uniform", "variants": "v", "target": 3, "exports": exports}
    sections = {"variants": {"v": {"method": "gptq"}}, "searches": {"q3": search}, "evaluation": {"runtime": True}}
    settings = load_settings([write_settings(tmp_path, "7B", **sections)])
    monkeypatch.setattr("evopress.evaluation.llama_cpp.is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"evaluation\.runtime: .*; run `pip install -e '\.\[runtime\]'`"):
        require_fit(settings, {})
    monkeypatch.setattr("evopress.evaluation.llama_cpp.is_installed", lambda: True)
    require_fit(settings, {})


def test_an_architecture_that_a_file_cannot_hold_is_told_beforehand(tmp_path):
    search = {"strategy": "uniform", "variants": "v", "target": {"bpw": 5}, "exports": ["gguf"]}
    sections = {"variants": {"v": {"method": "gguf", "types": ["Q4_0", "Q8_0"]}}, "searches": {"s": search}}
    settings = load_settings([write_settings(tmp_path, "7B", **sections)])
    require_fit(settings, LLAMA)
    with pytest.raises(ConfigError, match=r"^searches\.s\.exports: models of the type opt cannot be written as GGUF"):
        require_fit(settings, LLAMA | {"model_type": "opt"})


def test_the_architectures_that_are_foreseen_are_those_that_are_written():
    assert set(MODEL_TYPES) == set(LAYOUTS)
