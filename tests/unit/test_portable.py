"""What is written loads alike under transformers 4 and 5, and tells nothing of the machine that wrote it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_sources
import torch
import transformers
import transformers_four
from architectures import CONFIGS, build, tokens

from evopress.artifacts.paths import Run
from evopress.config.model import FolderModel, GgufModel
from evopress.export.shorter import write_cut_config
from evopress.models.portable import make_portable, portable_config, portable_tokenizer_config
from evopress.models.skeleton import HOW_TO_COMPUTE, load_config
from evopress.models.sources import prepare_model

TEXT = "abc"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
ROPES: dict[str, tuple[str, dict]] = {
    "another base": ("llama", {"rope_type": "default", "rope_theta": 500000.0}),
    "llama3": ("llama", {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}),
    "longrope": (
        "llama",
        {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **LONG},
    ),
    "yarn": ("qwen3", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}),
    "linear": ("mistral", {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}),
    "part of the head": ("phi3", {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}),
    "own names": ("gpt-neox", {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}),
    "by kind of layer": (
        "gemma3",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    ),
}
PLAIN = ("llama", "mistral", "qwen2-sliding", "qwen3", "phi3", "phi3-longrope", "gemma2", "gemma3", "phi", "gpt-neox")


def write(folder: Path, name: str) -> Path:
    """The folder of an architecture of `architectures`, or of one with the rotary positions of `ROPES`."""
    if name not in ROPES:
        return tiny_sources.folder(folder, name)
    base, rope = ROPES[name]
    kind, values = CONFIGS[base]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**values, "rope_parameters": rope}, initializer_range=0.2)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_sources.tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.transformers4
def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    """All in one process of version 4, which takes seconds to start."""
    folders, expected = [], []
    for name in (*PLAIN, *ROPES):
        source = write(tmp_path / "sources" / name, name)
        expected.append(logits(source))  # before anything is rewritten
        run = Run(tmp_path / "results" / name)
        prepare_model(FolderModel(path=str(source)), run)
        folders.append(run.model)
    path, run = tiny_sources.gguf_file(tmp_path / "tiny.gguf", build("llama")), Run(tmp_path / "results/gguf")
    prepare_model(GgufModel(path=str(path), dtype="float32"), run)
    folders.append(run.model)
    expected.append(logits(run.model))
    for name in ("gemma3", "by kind of layer", "mistral"):  # what remains where a block is dropped
        folders.append(cut(Run(tmp_path / "results" / name).model, tmp_path / f"cut-{name}"))
        expected.append(logits(folders[-1]))
    found, encoded = transformers_four.run(folders, tokens(), TEXT, tmp_path)
    for folder, there, here in zip(folders, found, expected, strict=True):
        torch.testing.assert_close(
            there, here, rtol=1e-5, atol=1e-5, msg=lambda text, folder=folder: f"{folder} {text}"
        )
    for folder, there in zip(folders, encoded, strict=True):
        if "qwen2" not in folder.as_posix():  # version 5 reads its vocabulary as bytes, which the tiny one is not
            assert there == transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != [], folder


def cut(source: Path, folder: Path) -> Path:
    """A model, with weights of its own, of the config that dropping the second block leaves."""
    folder.mkdir()
    write_cut_config(source, folder, [0, 2])
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(load_config(folder), dtype=torch.float32)
    text = (folder / "config.json").read_text()
    made.save_pretrained(folder)
    (folder / "config.json").write_text(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.parametrize("name", [*ROPES, "phi3-longrope", "qwen2-sliding"])
def test_version_5_reads_the_same_as_before(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    before, expected = load_config(folder).get_text_config().rope_parameters, logits(folder)
    make_portable(folder)
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_theta" in raw and "rope_scaling" in raw and raw["torch_dtype"] == raw["dtype"] == "float32"
    after = load_config(folder).get_text_config().rope_parameters
    assert {key: value for key, value in after.items() if key != "type"} == before
    assert torch.equal(logits(folder), expected)


def test_what_version_4_cannot_say_stays_as_version_5_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Phi-3 takes two lists there and no factor, which version 5 would then lack as well."""
    folder = tiny_sources.folder(tmp_path / "model", "phi3-longrope")
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"]["attention_factor"] = 1.5
    (folder / "config.json").write_text(json.dumps(raw))
    make_portable(folder)
    assert load_config(folder).rope_parameters["attention_factor"] == 1.5
    assert "transformers 4 has no names for these rotary positions" in caplog.text


def test_a_portable_folder_is_not_written_again(tmp_path: Path) -> None:
    folder = tiny_sources.folder(tmp_path / "model")
    make_portable(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_portable(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def strings(value: object) -> Iterator[str]:
    """All texts and names in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def test_nothing_of_this_machine_is_written(tmp_path: Path) -> None:
    folder = tiny_sources.folder(tmp_path / "model")
    for name, left in {
        "config.json": {"_name_or_path": "/home/me/tiny", "_attn_implementation": "eager", "_commit_hash": "c0ffee"},
        "tokenizer_config.json": {"tokenizer_file": "/home/me/t.json", "is_local": True, "name_or_path": "/home/me"},
    }.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **left}))
    make_portable(folder)
    for path in folder.glob("*config.json"):
        told = set(strings(json.loads(path.read_text())))
        assert not told & {"_attn_implementation", "_commit_hash", "is_local", "local_files_only", "backend"}, path
        assert not [text for text in told if text.startswith("/") and len(text) > 1], path


def test_tokens_that_look_like_paths_stay() -> None:
    assert portable_tokenizer_config({"sep_token": "/", "merges_file": "merges.txt"}, fast=True) == {
        "sep_token": "/",
        "merges_file": "merges.txt",
    }


def test_tokenizer_of_version_5_gets_a_class_of_both() -> None:
    new = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    old = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert portable_tokenizer_config(new, fast=True) == old
    assert portable_tokenizer_config(old, fast=True) == old
    slow = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    assert portable_tokenizer_config(slow, fast=False) == slow


@pytest.mark.parametrize("key", sorted(HOW_TO_COMPUTE))
def test_settings_of_how_to_compute_are_left_out_of_every_section(key: str) -> None:
    config = {"model_type": "x", key: True, "text_config": {key: True, "hidden_size": 8}}
    assert portable_config(config) == {"model_type": "x", "text_config": {"hidden_size": 8}}


@pytest.mark.parametrize(
    "left",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"return_dict": False, "output_hidden_states": True, "torchscript": True},
    ],
)
def test_a_model_is_prepared_however_its_config_would_compute_it(left: dict, tmp_path: Path) -> None:
    folder = tiny_sources.folder(tmp_path / "model")
    path, expected = folder / "config.json", logits(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **left}))
    config = load_config(folder)  # as the plan reads it, before anything is prepared
    assert config._attn_implementation is None and config.return_dict and not config.output_hidden_states
    run = Run(tmp_path / "results")
    prepare_model(FolderModel(path=str(folder)), run)
    assert torch.equal(logits(run.model), expected)
    assert not set(left) & set(json.loads((run.model / "config.json").read_text()))
