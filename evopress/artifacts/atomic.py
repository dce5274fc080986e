"""Writes that either happen whole or not at all, even with two writers or a full disk."""

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evopress.util.errors import ArtifactError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
_LOST = (*_NO_SPACE, errno.EIO)
"""What a sync answers where the data did not reach the disk."""
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
"""What file systems (network shares, FAT) answer to what they cannot do: sync, keep modes, rename over a file."""


def explain(error: OSError, path: Path | str) -> ArtifactError:
    """The error to report where ``path`` could not be written."""
    if error.errno in _NO_SPACE:
        return ArtifactError(f"{path}: no space left on the disk; free some and run again (nothing was written)")
    if error.errno in _NO_ACCESS:
        return ArtifactError(
            f"{path}: cannot be written ({error.strerror}); check the permissions of the results folder"
        )
    return ArtifactError(f"{path}: cannot be written ({error}); check the disk and its limits, then run again")


def is_lack_of_space_or_access(error: OSError) -> bool:
    """Whether an error says that a disk is full or may not be written, rather than that a program is wrong."""
    return error.errno in (*_NO_SPACE, *_NO_ACCESS)


@contextmanager
def atomic_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary files beside ``paths``; on success they take the places of ``paths`` together.

    All paths lie in one folder. The last is the seal: readers ask for it, it goes before the others are replaced and
    comes back after them, so that whenever it is there, what it seals is of one writer. A temporary file may be made a
    folder.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    folder, seal = paths[0].parent, paths[-1]
    temporaries = tuple(map(_temporary, paths))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, temporary in zip(paths, temporaries, strict=True):
            _remove_abandoned(path)
            temporary.touch()
        mode = temporaries[0].stat().st_mode & 0o666
        yield temporaries
        for temporary in temporaries:
            _finish(temporary, mode)
        with _locked(folder):
            if len(paths) > 1:
                seal.unlink(missing_ok=True)
            for path, temporary in zip(paths, temporaries, strict=True):
                _put(temporary, path)
            _sync(folder)
    except OSError as error:
        raise explain(error, paths[0]) from error
    finally:
        for temporary in temporaries:
            _remove(temporary)
            _remove(_displaced(temporary))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over ``path``, else removed.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    with atomic_files(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, else it is removed.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    with atomic_files(path) as (temporary,):
        temporary.unlink()
        temporary.mkdir()
        yield temporary


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, for what is needed only while ``path`` is made; it is removed at the end.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = path.with_name(f"{path.name}.scratch")
    temporary = _temporary(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        temporary.mkdir()
        yield temporary
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a small text artifact whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small binary artifact whole."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def _temporary(path: Path) -> Path:
    """Name beside ``path`` that no other thread or process, on this host or another, uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}.tmp")


def _displaced(temporary: Path) -> Path:
    """Where what a folder replaces lies for a moment."""
    return temporary.with_suffix(".old")


def _remove_abandoned(path: Path) -> None:
    """Remove what writers of ``path`` left that were killed on this host; of other hosts' nothing is known."""
    name = re.compile(re.escape(f".{path.name}.{socket.gethostname()}.") + r"(\d+)\.\d+\.(tmp|old)")
    for entry in path.parent.iterdir():
        match = name.fullmatch(entry.name)
        if match and not _runs(int(match[1])):
            _remove(entry)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; never what a link points to."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _finish(temporary: Path, mode: int) -> None:
    """Bring what was written to the disk, readable by whom the umask lets (safetensors lets the owner alone)."""
    if not temporary.is_dir():
        _set_mode(temporary, mode)
        _sync(temporary)
        return
    for child in temporary.rglob("*"):
        if child.is_symlink():
            continue
        if child.is_file():
            _set_mode(child, mode)
        _sync(child)
    _sync(temporary)


def _set_mode(path: Path, mode: int) -> None:
    """Change who may read a file, where the file system keeps modes."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def _put(temporary: Path, path: Path) -> None:
    """Let ``temporary`` take the place of ``path``."""
    if not temporary.is_dir():
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in (*_UNABLE, errno.EEXIST) or not path.exists():
                raise
    while True:
        _displace(path, _displaced(temporary))
        try:
            temporary.rename(path)
            return
        except OSError as error:  # without locks, another writer may have put its own in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            _remove(_displaced(temporary))


def _displace(path: Path, aside: Path) -> None:
    """Move what lies at ``path``, if anything does, out of the way."""
    try:
        path.rename(aside)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _remove(path)  # a folder of a lower layer of an overlay, which cannot be renamed


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold other writers off while files change places; where the file system cannot lock, go on without."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Bring an open file or folder to the disk, where the file system can.

    Many network shares, and folders that a virtual machine shares, cannot sync a folder, some no file: what was
    written there is as safe as it can be.

    Raises:
        OSError: the data did not reach the disk.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if error.errno in _LOST or not (folder or error.errno in _UNABLE):
            raise
