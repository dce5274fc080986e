"""Results on file systems that lack an ability: network shares, shared folders of virtual machines, FAT, overlays."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evopress.artifacts import tensors
from evopress.artifacts.atomic import atomic_folder, write_text
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tensors import read_tensors, write_tensors
from evopress.compression.store import ReadAhead
from evopress.util import accelerators
from evopress.util.accelerators import Card, Device, leased
from evopress.util.errors import ArtifactError, ConfigError, DamagedError

PROVENANCE = Provenance("evaluation", '{"a":1}', "f" * 64)


def refusing(function: Callable[..., Any], number: int, when: Callable[..., bool]) -> Callable[..., Any]:
    """The system call, which fails with an error number where ``when`` holds of its arguments."""

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return call


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def write_twice(folder: Path) -> None:
    """Write a text, tensors with their manifest, and a folder, each over an older one; check what is there."""
    for value in ("old", "new"):
        write_text(folder / "a.txt", value)
        write_tensors({"x": torch.full((2,), float(value == "new"))}, folder / "a.safetensors", PROVENANCE)
        with atomic_folder(folder / "model") as made:
            (made / value).write_text(value)
    assert (folder / "a.txt").read_text() == "new"
    assert read_tensors(folder / "a.safetensors")["x"].tolist() == [1.0, 1.0]
    assert [path.name for path in (folder / "model").iterdir()] == ["new"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.safetensors", "a.txt", "model"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_where_folders_cannot_be_synced_everything_is_written(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number, is_folder))
    write_twice(tmp_path)


def test_where_nothing_can_be_synced_everything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EINVAL, lambda descriptor: True))
    write_twice(tmp_path)


@pytest.mark.parametrize(("number", "message"), [(errno.EIO, "check the disk"), (errno.EDQUOT, "no space left")])
@pytest.mark.parametrize("which", [is_folder, lambda descriptor: not is_folder(descriptor)], ids=["folder", "file"])
def test_a_sync_that_lost_data_is_an_error(tmp_path, monkeypatch, which, number, message):
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number, which))
    with pytest.raises(ArtifactError, match=message):
        write_text(tmp_path / "a.txt", "text")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_where_modes_are_not_kept_everything_is_written(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "chmod", refusing(os.chmod, number, lambda *arguments: True))
    write_twice(tmp_path)


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.ENOTSUP])
def test_where_a_file_cannot_be_renamed_over_another_everything_is_written(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "replace", refusing(os.replace, number, lambda source, target: Path(target).exists()))
    write_twice(tmp_path)


def test_where_the_results_folder_may_not_be_changed_the_old_file_stays(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refusing(getattr(os, call), errno.EACCES, lambda *arguments: True))
    with pytest.raises(ArtifactError, match="check the permissions"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_where_a_folder_of_a_lower_layer_cannot_be_renamed_it_is_replaced(tmp_path, monkeypatch):
    """As overlays of containers do: EXDEV for a folder that lies in the image."""

    def lower(source: Any, target: Any) -> bool:
        return Path(source).name == "model"

    monkeypatch.setattr(os, "rename", refusing(os.rename, errno.EXDEV, lower))
    write_twice(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOTSUP])
def test_where_folders_cannot_be_locked_everything_is_written(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, number, lambda *arguments: True))
    write_twice(tmp_path)


def test_a_folder_of_leases_that_cannot_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, errno.ENOLCK, lambda *arguments: True))
    device = Device("0", Card("GPU-aaaaaaaa-0000-0000-0000-000000000000", "Big").uuid)
    environment = {accelerators.FOLDER_VARIABLE: str(tmp_path)}
    with (
        pytest.raises(ConfigError, match=r"cannot be locked to lease a device.*set EVOPRESS_LEASES"),
        leased("cuda", environment=environment, find=lambda environment: [device]),
    ):
        pass


def test_reading_ahead_is_left_out_where_it_cannot_be_done(tmp_path, monkeypatch):
    write_tensors({"x": torch.ones(2)}, tmp_path / "a.safetensors", PROVENANCE)
    calls = []

    def refuse(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    ReadAhead(tmp_path / "a.safetensors").ask(["x"])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("No such device (os error 19)"), "cannot be mapped into memory"),
        (OSError("Cannot allocate memory (os error 12)"), r"Cannot allocate memory.*ulimit -v"),
        (FileNotFoundError("No such file or directory: a.safetensors"), "there, but cannot be opened.*ulimit -n"),
    ],
)
def test_what_the_system_cannot_read_is_not_called_damaged(tmp_path, monkeypatch, error, message):
    """Damaged files are set aside, and made again."""
    write_tensors({"x": torch.ones(2)}, tmp_path / "a.safetensors", PROVENANCE)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(tensors, "safe_open", refuse)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_tensors(tmp_path / "a.safetensors")
    assert not isinstance(caught.value, DamagedError)
