"""Writes that either happen whole or not at all, even with two writers or a full disk."""

import errno
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evopress.errors import ArtifactError


def _temporary(path: Path) -> Path:
    """Name beside ``path`` that no other thread or process, on this host or another, uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, path: Path) -> ArtifactError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"{path}: no space left on the disk; free some and run again (nothing was written)")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return ArtifactError(
            f"{path}: cannot be written ({error.strerror}); check the permissions of the results folder"
        )
    return ArtifactError(f"{path}: cannot be written: {error}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over ``path``, else removed.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only the owner can read
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, else it is removed.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    displaced = temporary.with_suffix(".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for child in temporary.rglob("*"):
            if child.is_symlink():
                continue
            if child.is_file():
                child.chmod(mode)
            _sync(child)
        if path.exists():
            path.rename(displaced)
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(displaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text artifact whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
