"""The ready configurations for vLLM and llama.cpp: parsed, planned, and held against numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from paper_models import MODELS as PAPER_MODELS

from evopress.artifacts.paths import Run
from evopress.config.model import HubModel
from evopress.export.exporters.gguf import GgufFile
from evopress.plan.shape import shape_of
from evopress.plan.text import plan
from evopress.search.offered import Constraints
from evopress.search.problem import problem_of
from evopress.search.target import SizeTarget
from evopress.workflow.foreseen import require_fit
from evopress.workflow.settings import Settings, lay_over, load_settings, read_yaml

CONFIG = Path(__file__).resolve().parents[2] / "config"
_SHARED = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "dtype": "bfloat16", "hidden_act": "silu"}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": PAPER_MODELS["llama-3.1-8b"],
    "mistral-7b": PAPER_MODELS["mistral-7b-v0.3"],
    "phi-3-mini": {
        **_SHARED,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        **_SHARED,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "gemma-3-1b": {
        **_SHARED,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
    },
}
"""What decides the shapes of the models, as published."""
UNITS = 4
"""Of a block: q, k and v; o; gate and up; down. Phi-3 has them as four layers."""
BLOCK = {
    "llama-3.1-8b": 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336,
    "mistral-7b": 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336,
    "phi-3-mini": 4 * 3072 * 3072 + 3 * 3072 * 8192,
    "qwen3-8b": 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288,
    "gemma-3-1b": 2 * 1152 * 1024 + 2 * 1152 * 256 + 3 * 1152 * 6912,
}
"""Weights of the linear layers of a block."""


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(name: str, tmp_path: Path) -> Settings:
    """With a folder, which holds nothing but a config, in the place of the hub."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    source = {"model": {"source": "folder", "path": str(tmp_path), "dtype": "bfloat16"}}
    return Settings.load(lay_over(read_yaml(CONFIG / f"vllm-{name}.yaml"), source))


def test_there_is_one_for_each_model_and_they_differ_in_nothing_else() -> None:
    files = sorted(CONFIG.glob("vllm-*.yaml"))
    assert [path.stem.removeprefix("vllm-") for path in files] == sorted(MODELS)
    rest = []
    for path in files:
        values = read_yaml(path)
        assert values.pop("name") == path.stem and values["model"].pop("id")
        rest.append(values)
    assert all(values == rest[0] for values in rest)


def test_it_loads_and_asks_for_what_vllm_needs(name: str) -> None:
    settings = load_settings([CONFIG / f"vllm-{name}.yaml"])
    assert isinstance(settings.model, HubModel)
    search = settings.searches["evopress"]
    assert search.levels == ("4", "8") and ("k_proj", "q_proj", "v_proj") in search.tied
    require_fit(settings, MODELS[name])


def test_fused_layers_are_units_and_the_budget_is_four_and_a_half_bits(name: str, settings: Settings) -> None:
    shape = shape_of(settings.model, Run(Path("none")))
    assert shape is not None
    blocks, search = MODELS[name]["num_hidden_layers"], settings.searches["evopress"]
    table = settings.variants["gptq"].table(shape.layers, shape.itemsize, "variants.gptq")
    space = problem_of({"gptq": table}, Constraints("searches.evopress", 4.5, "none", search.tied, search.levels)).space
    assert len(space.units) == UNITS * blocks
    assert space.budget == BLOCK[name] * blocks * 9 // 2
    four = table[table["level"] == "4"]["bytes"].sum()
    assert four == BLOCK[name] * blocks * 4 // 8 + BLOCK[name] * blocks // 128 * 2  # codes, and scales of 16 bits


def test_it_can_be_planned(settings: Settings, tmp_path: Path) -> None:
    assert "search evopress, 100 generations" in plan(settings, Run(tmp_path / "run"), [24])


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def test_for_llama_cpp_there_is_one_for_each_model() -> None:
    files = sorted(CONFIG.glob("gguf-*.yaml"))
    assert [path.stem.removeprefix("gguf-") for path in files] == sorted(MODELS)
    for path in files:
        values = read_yaml(path)
        settings = load_settings([path])
        assert values["name"] == path.stem and isinstance(settings.model, HubModel)
        targets = [search.target for search in settings.searches.values()]
        assert all(isinstance(target, SizeTarget) and target.file == GgufFile() for target in targets)


def test_its_file_has_so_many_bits_for_each_parameter(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    source = {"model": {"source": "folder", "path": str(tmp_path), "dtype": "bfloat16"}}
    settings = Settings.load(lay_over(read_yaml(CONFIG / f"gguf-{name}.yaml"), source))
    require_fit(settings, MODELS[name])
    shape = shape_of(settings.model, Run(Path("none")))
    assert shape is not None
    search, target = settings.searches["evopress"], settings.searches["evopress"].target
    table = shape.table(settings.variants["gguf"], "variants.gguf")
    space = problem_of({"gguf": table}, Constraints("searches.evopress", target, file=shape.file)).space
    tied = MODELS[name].get("tie_word_embeddings", True)
    ends = MODELS[name]["vocab_size"] * MODELS[name]["hidden_size"] * (1 if tied else 2)
    blocks = BLOCK[name] * MODELS[name]["num_hidden_layers"]
    assert sum(unit.parameters for unit in space.units) == ends + blocks
    norms = shape.outside + shape.inside - ends - blocks
    assert isinstance(target, SizeTarget) and target.bpw is not None
    assert space.budget == int(target.bpw * (ends + blocks + norms) / 8) - 2 * norms
    assert "search evopress, 100 generations" in plan(settings, Run(tmp_path / "run"), [24])
    assert search.exports == ("gguf",)
