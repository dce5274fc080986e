"""What is damaged is noticed when docs/integrity.md says so, and is set aside without harm to anything else."""

import json
import os
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from finished_run import make_results
from safetensors.torch import load_file, save_file

from evopress.artifacts.manifest import damaged, file_facts, load_manifest, manifest_text, set_aside
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import PERPLEXITY, read_provenance, read_table, write_table
from evopress.artifacts.tensors import check_tensors, read_tensors, verify_tensors, write_tensors
from evopress.models import verify
from evopress.models.checkpoint import Checkpoint
from evopress.models.verify import check_model, check_weight, mark_links, tensor_digests, verify_model
from evopress.util.errors import ArtifactError, DamagedError

PROVENANCE = Provenance("evaluation", '{"a":1}', "f" * 64)
ROWS = pd.DataFrame([("q3", "docs", 12.5, 0.25, 0.01, 0.9, 0.02, 511)] * 20, columns=PERPLEXITY.names)


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


def test_any_changed_bit_of_tensors_is_noticed_by_who_verifies_them(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.arange(50.0)}, path, PROVENANCE, {"tokens": 7})
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"a\.safetensors: damaged"):
            verify_tensors(path)


def test_any_changed_bit_of_a_header_and_any_cut_is_noticed_when_tensors_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(50.0), "y": torch.ones(3, dtype=torch.uint8)}
    write_tensors(tensors, path, PROVENANCE)
    content = path.read_bytes()
    header = content[: -sum(tensor.nbytes for tensor in tensors.values())]
    for changed in flips(header):
        path.write_bytes(changed + content[len(header) :])
        with pytest.raises(DamagedError, match=r"a\.safetensors: damaged"):
            read_tensors(path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError, match=rf"holds {length} bytes instead of {len(content)}"):
            read_tensors(path)


def test_any_changed_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.arange(50.0)}, path, PROVENANCE, {"tokens": 7})
    manifest, said = manifest_path(path), check_tensors(path)
    unnoticed = 0
    for changed in flips(manifest.read_bytes()):
        manifest.write_bytes(changed)
        try:
            now = check_tensors(path)
        except DamagedError:
            continue
        unnoticed += 1
        assert {key: now[key] for key in said} == said
    assert unnoticed < 30  # blanks, and the name of the checksum


def described(folder: Path) -> Run:
    """A run whose model's manifest says what its files and tensors are."""
    run = make_results(folder)
    manifest = json.loads(run.model_manifest.read_text())
    weights = run.model / "model.safetensors"
    manifest["files"] = {
        "config.json": file_facts(run.model / "config.json"),
        weights.name: {"bytes": weights.stat().st_size},
    }
    manifest["tensors"] = tensor_digests(Checkpoint(run.model))
    run.model_manifest.write_text(manifest_text(manifest))
    return run


def change(weights: Path, name: str) -> None:
    """Flip a bit of a tensor; the file keeps its size."""
    tensors = load_file(weights)
    tensors[name].view(torch.uint8).flatten()[-1] ^= 1
    save_file(tensors, weights, metadata={"format": "pt"})


def test_any_changed_tensor_of_the_model_is_found_by_who_verifies_or_hands_it_on(tmp_path):
    run = described(tmp_path)
    weights, digests = run.model / "model.safetensors", check_model(run)
    assert verify_model(run) == []
    for name in list(digests)[::3]:
        change(weights, name)
        [error] = verify_model(run)
        assert f"{name} differs from the checksum" in str(error) and list(error.files) == [run.model_manifest]
        tensors = load_file(weights)
        with pytest.raises(DamagedError, match=f"{name} differs"):
            check_weight(run, digests, name, tensors.pop(name))
        assert all(check_weight(run, digests, other, tensor) is tensor for other, tensor in tensors.items())
        change(weights, name)
    assert verify_model(run) == []


def test_any_changed_small_file_of_the_model_and_any_cut_is_noticed_by_every_job(tmp_path):
    run = described(tmp_path)
    config, weights = run.model / "config.json", run.model / "model.safetensors"
    content = config.read_text()
    config.write_text(content.replace("16", "17", 1))
    with pytest.raises(DamagedError, match=r"config\.json: damaged \(differs from its checksum\)"):
        check_model(run)
    config.write_text(content)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DamagedError, match=r"model\.safetensors: damaged \(holds \d+ bytes instead of \d+\)") as caught:
        check_model(run)
    assert list(caught.value.files) == [run.model_manifest]
    weights.unlink()
    with pytest.raises(DamagedError, match=r"model\.safetensors: damaged \(missing\)"):
        check_model(run)


def test_linked_weights_that_changed_are_noticed_by_every_job(tmp_path, monkeypatch):
    run, own = described(tmp_path), tmp_path / "own.safetensors"
    weights = run.model / "model.safetensors"
    weights.replace(own)
    weights.symlink_to(own)
    mark_links(run.model)
    hashed: list[object] = []
    monkeypatch.setattr(verify, "tensor_digests", lambda checkpoint: hashed.append(1) or tensor_digests(checkpoint))
    digests = check_model(run)
    assert not hashed
    own.touch()
    assert check_model(run) == digests and check_model(run) == digests
    assert len(hashed) == 1  # a touched file is hashed again, once
    before = own.stat()
    change(own, next(iter(digests)))
    os.utime(own, ns=(before.st_atime_ns, before.st_mtime_ns - 10**12))  # another file with an earlier date
    with pytest.raises(DamagedError, match=f"{next(iter(digests))} differs from the checksum") as caught:
        check_model(run)
    set_aside(caught.value)
    assert own.exists() and weights.is_symlink() and not run.model_manifest.exists()


def test_what_is_damaged_is_set_aside(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.ones(3)}, path, PROVENANCE)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError) as caught:
        read_tensors(path)
    message = set_aside(caught.value)
    assert message.startswith(f"{path}: damaged (holds {size - 1} bytes instead of {size}); run again to remake it")
    assert "(what is left of it: " in message
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
