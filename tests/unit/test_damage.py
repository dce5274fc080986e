"""Every single changed bit is noticed, and what is damaged is set aside without harm to anything else."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from finished_run import make_results
from safetensors.torch import load_file, save_file

from evopress.artifacts.manifest import damaged, load_manifest, manifest_text, set_aside
from evopress.artifacts.paths import manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import PERPLEXITY, read_provenance, read_table, write_table
from evopress.artifacts.tensors import read_tensors, verify, write_tensors
from evopress.models.checkpoint import Checkpoint
from evopress.models.verify import require_intact, tensor_digests
from evopress.util.errors import ArtifactError, DamagedError

PROVENANCE = Provenance("evaluation", '{"a":1}', "f" * 64)
ROWS = pd.DataFrame([("q3", "docs", 12.5, 0.25, 511)] * 20, columns=PERPLEXITY.names)


def flips(content: bytes):
    """Copies of the content, each with one bit changed: one in every byte."""
    dice = random.Random(0)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << dice.randrange(8)
        yield bytes(changed)


def test_any_changed_bit_of_a_table_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(ROWS, path, PERPLEXITY, PROVENANCE)
    content = path.read_bytes()
    for number, changed in enumerate(flips(content)):
        path.write_bytes(changed)
        with pytest.raises(DamagedError):
            read_provenance(path) if number % 5 == 0 else read_table(path, PERPLEXITY)
    path.write_bytes(content)
    assert len(read_table(path, PERPLEXITY)) == 20


def test_a_table_cut_anywhere_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(ROWS, path, PERPLEXITY, PROVENANCE)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            read_table(path, PERPLEXITY)


def test_any_changed_bit_of_tensors_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.arange(50.0)}, path, PROVENANCE, {"tokens": 7})
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"a\.safetensors: damaged"):
            read_tensors(path)


def test_any_changed_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.arange(50.0)}, path, PROVENANCE, {"tokens": 7})
    manifest, said = manifest_path(path), verify(path)
    unnoticed = 0
    for changed in flips(manifest.read_bytes()):
        manifest.write_bytes(changed)
        try:
            now = verify(path)
        except DamagedError:
            continue
        unnoticed += 1
        assert {key: now[key] for key in said} == said
    assert unnoticed < 30  # blanks, and the name of the checksum


def test_any_changed_tensor_of_the_model_is_noticed(tmp_path):
    results = make_results(tmp_path)
    manifest = json.loads(results.model_manifest.read_text())
    manifest["tensors"] = tensor_digests(Checkpoint(results.model))
    config = results.model / "config.json"
    results.model_manifest.write_text(manifest_text(manifest))
    require_intact(results)
    weights = load_file(results.model / "model.safetensors")
    for name in list(weights)[::3]:
        changed = {key: tensor.clone() for key, tensor in weights.items()}
        changed[name].view(torch.uint8).flatten()[-1] ^= 1
        save_file(changed, results.model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DamagedError, match=f"{name} differs") as caught:
            require_intact(results)
        assert list(caught.value.files) == [results.model_manifest]
        others = [other for other in weights if other != name]
        require_intact(results, others)
    save_file(weights, results.model / "model.safetensors", metadata={"format": "pt"})
    manifest["files"] = {"config.json": {"bytes": config.stat().st_size, "sha256": "0" * 64}}
    results.model_manifest.write_text(manifest_text(manifest))
    with pytest.raises(DamagedError, match=r"config\.json: damaged \(missing or changed\)"):
        require_intact(results)


def test_what_is_damaged_is_set_aside(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.ones(3)}, path, PROVENANCE)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError) as caught:
        read_tensors(path)
    message = set_aside(caught.value)
    assert message.startswith(f"{path}: damaged (differs from its manifest); run again to remake it (what is left of")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json.damaged", "a.safetensors.damaged"]
    with pytest.raises(ArtifactError, match=r"a\.json: missing"):
        read_tensors(path)


def test_what_was_made_again_meanwhile_stays(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"damaged")
    with pytest.raises(DamagedError) as caught:
        read_table(path, PERPLEXITY)
    write_table(ROWS, path, PERPLEXITY, PROVENANCE)
    assert set_aside(caught.value).endswith("run again to remake it")
    assert len(read_table(path, PERPLEXITY)) == 20 and len(list(tmp_path.iterdir())) == 1


def test_two_that_meet_the_same_damage(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"damaged")
    errors = [damaged(path, "cut"), damaged(path, "cut")]
    first, second = map(set_aside, errors)
    assert "what is left of it" in first and second == f"{path}: damaged (cut); run again to remake it"


def test_what_a_link_points_to_is_never_touched(tmp_path):
    own = tmp_path / "mine.parquet"
    own.write_bytes(b"not a table")
    path = tmp_path / "results" / "a.parquet"
    path.parent.mkdir()
    path.symlink_to(own)
    with pytest.raises(DamagedError) as caught:
        read_table(path, PERPLEXITY)
    set_aside(caught.value)
    assert own.read_bytes() == b"not a table" and not path.exists()


def test_what_cannot_be_moved_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"damaged")
    error = damaged(path, "cut")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    assert set_aside(error).endswith(f"it cannot be set aside (Permission denied): delete {path} and run again")


def test_a_manifest_that_is_no_object(tmp_path):
    path = tmp_path / "a.json"
    for text in ("", "[]", "3", "{"):
        path.write_text(text)
        with pytest.raises(DamagedError):
            load_manifest(path, "model")
