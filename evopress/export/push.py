"""Uploading a finished export, with its card and the card's picture, to a repository of the Hugging Face hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evopress.artifacts.exports import read_export_manifest
from evopress.artifacts.manifest import damaged_files
from evopress.artifacts.paths import CARD, LEVEL_MAP, Run
from evopress.export.exporters import EXPORTERS
from evopress.util.errors import ArtifactError, ConfigError, brief

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Upload:
    """What goes to the hub."""

    folder: Path
    files: dict[str, int]
    """Bytes of each file, by its path below the folder; the card comes last."""


def prepare_upload(run: Run, search: str, exporter: str) -> Upload:
    """Read every file of an export and compare it with the manifest; what else is uploaded are card and picture.

    Raises:
        ArtifactError: the export is not there or not finished, or has no card.
        DamagedError: a file is missing, cut short or changed.
    """
    manifest, folder = run.export_manifest(search, exporter), run.export(search, exporter)
    files = read_export_manifest(run, search, exporter)["files"]
    for error in damaged_files(folder, files, manifest, content=True):
        raise error
    if not all(one.has_card for one in EXPORTERS.plugins if EXPORTERS.name_of(one) == exporter):
        raise ArtifactError(f"{folder}: {exporter} has no model card, which the hub needs; push another export")
    card = folder / CARD
    if not card.is_file():
        raise ArtifactError(f"{card}: missing; run the workflow to its end, which writes the model card")
    sizes = {name: int(facts["bytes"]) for name, facts in sorted(files.items()) if name != CARD}
    beside = [folder / LEVEL_MAP, card]
    return Upload(folder, sizes | {path.name: path.stat().st_size for path in beside if path.is_file()})


def push(upload: Upload, repository: str, api: "HfApi", *, private: bool = False) -> str:
    """Upload in one commit, so that the repository holds all or nothing of it; returns the commit's address.

    Args:
        upload: what goes there.
        repository: as in ``user/name``; made if it is not there.
        api: of the hub, logged in.
        private: whether a repository that is made is private.

    Raises:
        ConfigError: the name is none that the hub can have, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    check_repository(repository)
    operations = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.create_commit(repository, operations, commit_message="Upload a model compressed by evopress"))
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login`, as someone who may write there" if status in (401, 403) else "try again"
        raise ConfigError(f"{repository}: the hub refuses it ({brief(error)}); {advice}") from error
    except ValueError as error:
        raise ConfigError(f"{repository}: the hub refuses the card ({' '.join(str(error).split())})") from error
    except (HTTPError, OSError) as error:
        raise ConfigError(
            f"{repository}: cannot be uploaded ({brief(error)}); check the network and try again"
        ) from error


def check_repository(name: str) -> None:
    """Refuse a name that the hub cannot have.

    Raises:
        ConfigError: it says how to write one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII):
        raise ConfigError(f"--repo: {name!r} is no repository of the hub: write it as in someone/llama-4gb")
