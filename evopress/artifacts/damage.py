"""Damaged artifacts: named where they are read, and set aside by the job that met them, so that the next run remakes
them.

Only files that evopress itself has written are ever set aside. Of a model folder that is linked or of a folder as a
whole, that is its manifest: without it the stage counts as not done, and writes the folder anew.
"""

from pathlib import Path

from evopress.util.errors import DamagedError

SUFFIX = ".damaged"


def damaged(path: Path, reason: object, *files: Path) -> DamagedError:
    """The error for an artifact at ``path`` that is not what was written.

    Args:
        path: what to name.
        reason: what is wrong with it.
        files: what must go for it to be remade; ``path`` where none are given.
    """
    identities = {file: identity for file in files or (path,) if (identity := _identity(file)) is not None}
    return DamagedError(f"{path}: damaged ({reason})", identities)


def set_aside(error: DamagedError) -> str:
    """Rename the files of a damaged artifact, unless another has taken their place; returns the message to show."""
    moved = []
    for file, identity in error.files.items():
        target = file.with_name(file.name + SUFFIX)
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


def _identity(file: Path) -> tuple[int, ...] | None:
    """What changes when another file takes the place; a link's own, not that of what it points to."""
    try:
        facts = file.lstat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
