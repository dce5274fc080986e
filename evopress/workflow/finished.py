"""Whether variants are up to date, told from what they say of themselves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from evopress.artifacts.paths import Run, manifest_path
from evopress.workflow.keys import Keys


def finished_variants(
    run: Run, variants: str, blocks: Sequence[str], keys: Keys, read: Mapping[Path, Sequence[str]]
) -> bool:
    """Whether variants of all ``blocks`` are there, made with the key that they would be made with now.

    Args:
        run: the folder.
        variants: their name.
        blocks: of the model.
        keys: of what is asked for now.
        read: the user's own files that they rest on, by the artifact that was made of them. If one is newer, they may
            be out of date, however little was changed.
    """
    key = keys.variants(variants)
    tables = [run.variant_table(variants, block) for block in blocks]
    manifests = [manifest_path(run.variant_tensors(variants, block)) for block in blocks]
    tensors = [run.variant_tensors(variants, block) for block in blocks]
    if not all(path.exists() for path in [*tables, *manifests, *tensors, *read]):
        return False
    if any(_key_of(manifest) != key for manifest in manifests):
        return False
    return all(
        Path(source).stat().st_mtime <= made.stat().st_mtime for made, sources in read.items() for source in sources
    )


def _key_of(manifest: Path) -> str | None:
    """Key in the provenance of an artifact; None where it cannot be read."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["provenance"].get("key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
