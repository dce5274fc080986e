"""Artifacts are whole or absent: atomic writes, damage that is named, tables of the documented schema."""

import errno
import os
import socket
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from evopress.artifacts.atomic import atomic_file, atomic_folder, scratch_folder, write_text
from evopress.artifacts.paths import manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import PERPLEXITY, TASKS, read_provenance, read_table, write_table
from evopress.artifacts.tensors import check_tensors, read_tensors, verify_tensors, write_tensors
from evopress.util.errors import ArtifactError

PROVENANCE = Provenance("evaluation", '{"a":1}', "f" * 64)
ROWS = pd.DataFrame([("q3", "docs", 12.5, 0.25, 0.01, 0.9, 0.02, 511)] * 200, columns=PERPLEXITY.names)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert path.read_text() == "old" and files(tmp_path) == ["a.txt"]


def test_a_scratch_folder_goes_and_so_does_that_of_a_killed_process(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    killed = tmp_path / f".a.parquet.scratch.{socket.gethostname()}.{dead.pid}.{dead.pid}.tmp"
    killed.mkdir()
    (killed / "large").touch()
    with pytest.raises(RuntimeError), scratch_folder(tmp_path / "a.parquet") as folder:
        (folder / "half").touch()
        assert not killed.exists() and files(tmp_path) == [folder.name]
        raise RuntimeError("killed")
    assert files(tmp_path) == []


def test_a_failed_folder_leaves_what_was_there_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("half")
        raise RuntimeError("killed")
    assert (tmp_path / "model" / "weights").read_text() == "old" and files(tmp_path) == ["model"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / name).write_text(name)
    assert files(tmp_path / "model") == ["new"] and files(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk; free some and run again"),
        (errno.EACCES, "check the permissions of the results folder"),
        (errno.EROFS, "check the permissions of the results folder"),
    ],
)
def test_errors_of_the_disk_say_where_and_what_to_do(tmp_path, number, message):
    with pytest.raises(ArtifactError, match=message) as caught, atomic_file(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "a.txt") in str(caught.value) and files(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_named_by_a_real_write(tmp_path):
    with pytest.raises(ArtifactError, match="no space left"), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        with temporary.open("w") as stream:
            stream.write("x")
    assert files(tmp_path) == []


def test_many_writers_leave_one_whole_file(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a.txt", text), texts))
    assert (tmp_path / "a.txt").read_text() in texts and files(tmp_path) == ["a.txt"]


def test_files_follow_the_umask(tmp_path):
    write_table(ROWS, tmp_path / "a.parquet", PERPLEXITY, PROVENANCE)
    write_tensors({"x": torch.ones(2)}, tmp_path / "a.safetensors", PROVENANCE)
    write_text(tmp_path / "plain", "")
    with atomic_folder(tmp_path / "model") as folder:
        save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert len(made) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {stat.S_IMODE(ordinary.stat().st_mode)}


def test_a_table_returns_with_its_provenance(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(ROWS, path, PERPLEXITY, PROVENANCE)
    pd.testing.assert_frame_equal(read_table(path, PERPLEXITY), ROWS, check_dtype=False)
    assert read_provenance(path) == PROVENANCE


def test_a_table_of_another_schema_is_refused(tmp_path):
    write_table(ROWS, tmp_path / "a.parquet", PERPLEXITY, PROVENANCE)
    with pytest.raises(ArtifactError, match=r"a\.parquet: has columns"):
        read_table(tmp_path / "a.parquet", TASKS)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_table_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_table(ROWS, path, PERPLEXITY, PROVENANCE)
    _damage(path, damage, at=60)
    with pytest.raises(ArtifactError, match=r"a\.parquet: (damaged|missing)"):
        read_table(path, PERPLEXITY)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damaged_tensors_are_named(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.arange(100.0)}, path, PROVENANCE)
    _damage(path, damage, at=-4)
    with pytest.raises(ArtifactError, match=r"a\.safetensors: (damaged|missing)"):
        verify_tensors(path)
    if damage != "flip":  # which only those notice who read the content
        with pytest.raises(ArtifactError, match=r"a\.safetensors: (damaged|missing)"):
            read_tensors(path)


def test_tensors_without_a_manifest_are_not_finished(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"x": torch.ones(3)}, path, PROVENANCE, {"tokens": 7})
    assert check_tensors(path)["facts"] == {"tokens": 7}
    manifest_path(path).unlink()
    with pytest.raises(ArtifactError, match=r"a\.json: missing"):
        read_tensors(path)


def _damage(path: Path, how: str, at: int) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[at] ^= 0x10
        path.write_bytes(content)
