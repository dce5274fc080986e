"""Memory that jobs ask a cluster for, on a model of 8 billion parameters."""

import json

import pytest
from large_models import write_settings

from evopress.artifacts.paths import Run
from evopress.config.model import FolderModel, PypiModel
from evopress.models.config_file import model_config
from evopress.workflow.jobs import Memory
from evopress.workflow.settings import load_settings

LLAMA = {"hidden_size": 4096, "dtype": "bfloat16"}


def memory(folder, config=LLAMA, data=None, **sections):
    (folder / str(len(list(folder.iterdir())))).mkdir()
    texts = {"calibration": text(1 << 20), "search": text(1 << 20), "evaluation": {"held": text(4096)}} | (data or {})
    path = write_settings(max(folder.iterdir()), "7B", data=texts, **sections)
    return Memory(load_settings([path]), config)


def text(tokens):
    return {"source": "python_docs", "tokens": tokens, "sequence_length": 2048}


def test_a_chain_holds_the_hidden_states_of_all_calibration_tokens(tmp_path):
    made = memory(tmp_path, data={"calibration": text(1 << 23)})
    states = (1 << 23) * 4096 * 2 // 1_000_000
    assert states == 68_719
    assert made.chain(1) == 16_000 + states and made.chain(2) == 32_000 + states
    assert made.hessians(1) == 64_000 + states


def test_an_asymmetric_polish_holds_the_states_of_two_models(tmp_path):
    uniform = {"strategy": "uniform", "variants": "gptq", "target": 3}
    searches = {how: {**uniform, "polish": how} for how in ("sequential", "asymmetric")}
    made = memory(tmp_path, data={"calibration": text(1 << 23)}, searches=searches)
    assert made.polish("sequential", 1) == 16_000 + 68_719
    assert made.polish("asymmetric", 2) == 32_000 + 2 * 68_719


def test_shards_hold_their_share(tmp_path):
    made = memory(tmp_path, data={"calibration": text(1 << 23)}, hessians={"shards": 4})
    assert made.hessians(1) == 64_000 + 68_719 // 4


def test_a_model_in_float32_and_a_cpu_take_twice_as_much(tmp_path):
    data = {"calibration": text(1 << 23)}
    for made in (
        memory(tmp_path, LLAMA | {"dtype": "float32"}, data=data),
        memory(tmp_path, {"hidden_size": 4096, "torch_dtype": "float32"}, data=data),
        memory(tmp_path, data=data, compute={"device": "cpu"}),
    ):
        assert made.chain(1) == 16_000 + 137_438


def test_evaluation_holds_two_models_states_of_its_longest_text(tmp_path):
    made = memory(tmp_path, data={"evaluation": {"a": text(1 << 20), "b": text(1 << 21)}})
    assert made.evaluation(1) == 64_000 + 2 * ((1 << 21) * 4096 * 2 // 1_000_000)


def test_the_embedding_takes_what_its_vocabulary_takes(tmp_path):
    weights = 128_256 * 4096
    llama = LLAMA | {"vocab_size": 128_256, "tie_word_embeddings": False}
    variants = {"gptq": {"method": "gguf", "rounding": "rtn", "types": ["Q2_K", "Q8_0"]}}
    made = memory(tmp_path, llama, variants=variants)
    # Two float32 copies, what is packed, and the rounding of one of the two, beside both variants of both.
    least = (8 * weights + 2 * 2 * weights) // 1_000_000
    assert 16_000 + least < made.embedding("gptq", 1) < 16_000 + 3 * least
    assert made.embedding("gptq", 2) == made.embedding("gptq", 1) + 16_000
    tied = memory(tmp_path, llama | {"tie_word_embeddings": True}, variants=variants)
    assert made.embedding("gptq", 1) - tied.embedding("gptq", 1) in (2 * weights // 10**6, 2 * weights // 10**6 + 1)
    assert memory(tmp_path, variants=variants).embedding("gptq", 1) == 16_000, "no vocabulary is known"
    unfit = memory(tmp_path, llama | {"hidden_size": 4100}, variants=variants)
    assert unfit.embedding("gptq", 1) > 16_000, "the job will say that no type fits"


def test_a_model_of_which_nothing_is_known_takes_the_least(tmp_path):
    made = memory(tmp_path, {}, data={"calibration": text(1 << 23)})
    assert made.chain(1) == 16_000


@pytest.mark.parametrize("nested", [False, True])
def test_the_config_of_a_folder(tmp_path, nested):
    config = {"text_config": LLAMA, "hidden_size": 7} if nested else LLAMA
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_config(FolderModel(path=str(tmp_path)), Run(tmp_path))["hidden_size"] == 4096


def test_the_config_of_a_wheel_is_known_once_the_model_is_there(tmp_path):
    settings, run = PypiModel(package="tiny", version="1.0", sha256="0" * 64, file="m.gguf"), Run(tmp_path)
    assert model_config(settings, run) == {}
    run.model.mkdir()
    (run.model / "config.json").write_text(json.dumps(LLAMA))
    assert model_config(settings, run)["hidden_size"] == 4096
    (run.model / "config.json").write_text("[")
    assert model_config(settings, run) == {}


def test_a_search_holds_the_text_in_the_working_type_or_single_effects_in_float32(tmp_path):
    def needed(strategy, **settings):
        search = {"strategy": strategy, "variants": "gptq", "target": 3.0, **settings}
        variants = {"gptq": {"method": "gptq", "bits": [2, 3, 4], "group_size": 64}}
        made = memory(tmp_path, variants=variants, searches={"s": search}, compute={"memory_gb": 10})
        return made.search("s", 1) - 48_000 - 12_000 - 10_000

    assert needed("uniform") == 0
    whole = (1 << 20) * 4096 * 2 // 1_000_000
    assert needed("dp", errors="kl", tokens=4096) == whole
    assert needed("dp", errors="kl", tokens=1 << 20) == (1 << 20) * 4096 * 4 // 1_000_000
