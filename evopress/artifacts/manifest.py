"""Manifests, checksums, and what happens to a damaged artifact (docs/integrity.md says what is checked when).

A manifest is a small JSON file that says what an artifact is, with a checksum of what it says. A damaged artifact is
named where it is read, and set aside by the job that met it, so that the next run makes it again. Only files that
evopress itself has written are ever set aside. Of a model folder, which may be links, that is its manifest: without it
the stage counts as not done, and writes the folder anew.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evopress.util.errors import ArtifactError, DamagedError

DAMAGED_SUFFIX = ".damaged"
WEIGHTS_SUFFIX = ".safetensors"
_CHECKSUM = "checksum"
_CHUNK = 1 << 22


def manifest_text(content: Mapping[str, Any]) -> str:
    """Text of a manifest, with its checksum."""
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1, sort_keys=True) + "\n"


def load_manifest(path: Path, stage: str = "") -> dict[str, Any]:
    """Read a manifest and check that it says what was written; ``stage`` is who writes it, if its path does not tell.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop(_CHECKSUM, None)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run the stage that writes it{stage and f' ({stage})'}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise damaged(path, repr(error)) from error
    if checksum is not None and checksum != _checksum(content):  # a hit in the key itself leaves the rest as it was
        raise damaged(path, "differs from its checksum")
    return content


def sha256(path: Path) -> str:
    """Digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_facts(path: Path) -> dict[str, str | int]:
    """Digest and size of a file, for a manifest; it is read whole."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def damaged_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], manifest: Path, *, content: bool = False
) -> Iterator[DamagedError]:
    """Compare the files of a model folder with what its manifest says of them.

    Sizes are always compared, and digests of all but weights, whose digests wait until ``content`` is asked for.

    Args:
        folder: holds the files.
        files: facts of each file, by its path below ``folder``; without ``sha256`` only the size is compared.
        manifest: must go for the folder to be written anew.
        content: whether to read the weights, too.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.exists():
            yield damaged(path, "missing", manifest)
        elif (size := path.stat().st_size) != facts["bytes"]:
            yield damaged(path, f"holds {size} bytes instead of {facts['bytes']}", manifest)
        elif (content or path.suffix != WEIGHTS_SUFFIX) and facts.get("sha256") not in (None, sha256(path)):
            yield damaged(path, "differs from its checksum", manifest)


def damaged(path: Path, reason: object, *files: Path) -> DamagedError:
    """The error for an artifact at ``path`` that is not what was written.

    Args:
        path: what to name.
        reason: what is wrong with it.
        files: what must go for it to be remade; ``path`` where none are given.
    """
    return DamagedError(f"{path}: damaged ({reason})", _identities(files or (path,)))


@contextmanager
def remade_with(output: Path, *files: Path) -> Iterator[None]:
    """Enclose the reading of what is no output of a job by itself, but stands and falls with its ``output``.

    Args:
        output: the job runs again once that is gone; it is written last.
        files: must be there where it is.

    Raises:
        DamagedError: a file is missing, or was found to be damaged; ``output`` is among what must go.
    """
    for file in files if output.exists() else ():
        if not file.exists():
            raise damaged(file, "missing", output)
    try:
        yield
    except DamagedError as error:
        raise DamagedError(error.problem, {**error.files, **_identities([output])}) from error


def set_aside(error: DamagedError) -> str:
    """Rename the files of a damaged artifact, unless another has taken their place; returns the message to show."""
    moved = []
    for file, identity in error.files.items():
        target = file.with_name(file.name + DAMAGED_SUFFIX)
        try:
            if _identity(file) == identity:
                file.replace(target)
                moved.append(str(target))
        except FileNotFoundError:
            continue  # another job has met the same damage
        except OSError as reason:
            return f"{error.problem}; it cannot be set aside ({reason.strerror}): delete {file} and run again"
    kept = f" (what is left of it: {', '.join(moved)})" if moved else ""
    return f"{error.problem}; run again to remake it{kept}"


def _identities(files: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Of those files that are there."""
    return {file: identity for file in files if (identity := _identity(file)) is not None}


def _identity(file: Path) -> tuple[int, ...] | None:
    """What changes when another file takes the place; a link's own, not that of what it points to."""
    try:
        facts = file.lstat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
