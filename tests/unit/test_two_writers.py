"""Processes that write the same artifact at the same time, and those that died while they wrote."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evopress.artifacts.atomic import atomic_file, atomic_folder, write_text
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tensors import read_tensors, verify_tensors, write_tensors
from evopress.util.errors import ArtifactError, DamagedError

CONTEXT = multiprocessing.get_context("fork")
ROUNDS = 25


def write_tensors_often(path: Path, number: int) -> None:
    for turn in range(ROUNDS):
        tensors = {"x": torch.full((200 + number,), float(number)), "turn": torch.tensor(turn)}
        write_tensors(tensors, path, Provenance("test", str(number), "f" * 64))


def write_folder_often(path: Path, number: int) -> None:
    for _ in range(ROUNDS):
        with atomic_folder(path) as folder:
            for part in range(3):
                (folder / f"{part}-{number}").write_text(str(number) * 1000)


def write_text_often(path: Path, number: int) -> None:
    for _ in range(ROUNDS):
        write_text(path, str(number) * 10_000)


def together(write: Callable[[Path, int], None], path: Path, look: Callable[[], None]) -> None:
    """Let three processes write, and look at what is there all the while."""
    writers = [CONTEXT.Process(target=write, args=(path, number)) for number in range(1, 4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        look()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0


def test_tensors_and_their_manifest_are_of_one_writer(tmp_path):
    path = tmp_path / "a.safetensors"

    def look() -> None:
        try:
            verify_tensors(path)
        except DamagedError:
            raise
        except ArtifactError as error:
            assert "missing" in str(error)  # for the moment in which both are replaced

    together(write_tensors_often, path, look)
    number = int(verify_tensors(path)["provenance"]["settings"])
    assert read_tensors(path)["x"].tolist() == [float(number)] * (200 + number)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_a_folder_is_of_one_writer(tmp_path):
    def look() -> None:
        try:
            seen = {file.name.partition("-")[2] for file in (tmp_path / "model").iterdir()}
        except FileNotFoundError:
            return
        assert len(seen) <= 1  # 0: emptied after it was replaced, while it was being listed

    together(write_folder_often, tmp_path / "model", look)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    files = sorted((tmp_path / "model").iterdir())
    assert len(files) == 3 and len({file.name[1:] for file in files}) == 1
    assert all(file.stat().st_size == 1000 for file in files)


def test_folders_are_of_one_writer_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    test_a_folder_is_of_one_writer(tmp_path)


def test_a_file_is_of_one_writer(tmp_path):
    path = tmp_path / "a.txt"

    def look() -> None:
        if path.exists():
            text = path.read_text()
            assert len(text) == 10_000 and len(set(text)) == 1

    together(write_text_often, path, look)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def _die_writing(folder: Path) -> None:
    with atomic_file(folder / "a.txt") as file, atomic_folder(folder / "model") as model:
        file.write_text("half")
        (model / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_goes_with_the_next_write_and_nothing_else_does(tmp_path):
    for name in ("a.txt.json", ".a.txt.elsewhere.1.1.tmp", f".a.txt.{os.uname().nodename}.{os.getpid()}.1.tmp"):
        (tmp_path / name).touch()
    kept = {file.name for file in tmp_path.iterdir()}
    writer = CONTEXT.Process(target=_die_writing, args=(tmp_path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    left = {file.name for file in tmp_path.iterdir()} - kept
    assert len(left) == 2 and all(name.startswith(".") for name in left)
    write_text(tmp_path / "a.txt", "whole")
    with atomic_folder(tmp_path / "model") as model:
        (model / "weights").write_text("whole")
    assert {file.name for file in tmp_path.iterdir()} == {*kept, "a.txt", "model"}


def test_a_folder_takes_the_place_of_a_link_and_leaves_what_it_points_to(tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "weights").write_text("mine")
    (tmp_path / "model").symlink_to(own)
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert (own / "weights").read_text() == "mine"
    assert not (tmp_path / "model").is_symlink() and (tmp_path / "model" / "weights").read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "model"]


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_limit_on_file_sizes_is_an_error_that_names_the_artifact(tmp_path, limit):
    results = CONTEXT.Queue()
    writer = CONTEXT.Process(target=_write_limited, args=(tmp_path / "a.safetensors", limit, results))
    writer.start()
    message = results.get(timeout=30)
    writer.join()
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: cannot be written") and "File too large" in message
    assert list(tmp_path.iterdir()) == []


def _write_limited(path: Path, limit: int, results: multiprocessing.Queue) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_tensors({"x": torch.ones(10_000)}, path, Provenance("test", "{}", "f" * 64))
        results.put("written")
    except ArtifactError as error:
        results.put(str(error))
