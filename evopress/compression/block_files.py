"""Files of a block's variants: packed tensors and their table, written in their place or kept until that is time."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from evopress.artifacts.atomic import atomic_file, atomic_files
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import VARIANTS, read_provenance, write_table
from evopress.artifacts.tensors import facts_made_by, write_tensors
from evopress.compression.base import LayerMethod, Variant
from evopress.compression.store import tensor_name
from evopress.util.errors import ArtifactError


def write_variants(
    run: Run,
    name: str,
    block: int | str,
    variants: list[Variant],
    table: pd.DataFrame,
    provenance: Provenance,
    facts: Mapping[str, object],
) -> None:
    """Write tensors, then the table (VARIANTS schema): an old table must not stand beside new tensors.

    Raises:
        ArtifactError: the files cannot be written.
    """
    run.module_table(name).unlink(missing_ok=True)  # of another method under this name
    write_packed(run.variant_tensors(name, block), run.variant_table(name, block), variants, table, provenance, facts)


def write_packed(
    tensors: Path,
    path: Path,
    variants: list[Variant],
    table: pd.DataFrame,
    provenance: Provenance,
    facts: Mapping[str, object],
) -> None:
    """The same at the paths ``tensors`` and, for the table, ``path``."""
    path.unlink(missing_ok=True)
    named = {
        tensor_name(variant.layer, variant.level, part): tensor
        for variant in variants
        for part, tensor in variant.parts.items()
    }
    write_tensors(named, tensors, provenance, facts)
    write_table(table, path, VARIANTS, provenance)


def variant_table(variants: list[Variant], layers: pd.DataFrame, method: LayerMethod) -> pd.DataFrame:
    """Table with the VARIANTS schema.

    Args:
        variants: of layers of one block, or of input embedding and head.
        layers: rows of the LAYERS schema.
        method: that has made the variants.
    """
    rows = {row["layer"]: row for row in layers.to_dict("records")}
    return pd.DataFrame(
        [
            {
                "block": rows[variant.layer]["block"],
                "layer": variant.layer,
                "name": rows[variant.layer]["name"],
                "family": method.family.name,
                "level": variant.level,
                "value": variant.value,
                "cost": variant.cost,
                "parameters": variant.parameters,
                "bits_per_weight": 8 * variant.bytes / variant.parameters,
                "bytes": variant.bytes,
                "error": variant.error,
                "damping": variant.damping,
                "format": variant.format,
            }
            for variant in variants
        ],
        columns=VARIANTS.names,
    )


def is_made(
    run: Run, name: str, block: int, provenance: Provenance, facts: Mapping[str, object], *, chain: bool = False
) -> bool:
    """Whether a job that was killed has made the variants of a block, of a ``chain`` with the states after it.

    It is, if they are whole and were made with ``provenance`` and ``facts``.
    """
    try:
        for path in _made(run, name, block, chain=chain):
            facts_made_by(path, provenance, facts)
        return read_provenance(run.made_table(name, block)) == provenance
    except ArtifactError:
        return False


def put_in_place(run: Run, name: str, blocks: Sequence[int], *, chain: bool = False) -> None:
    """Let what was made of all ``blocks`` of a job take the places of the variants of that ``name``.

    Snakemake removes outputs of a job that did not end, so all is kept aside until all is in its place, too. The job's
    log is that of its first block; logs of the others are of earlier jobs, which made fewer blocks each, and go.

    Raises:
        ArtifactError: the files cannot be written.
    """
    run.module_table(name).unlink(missing_ok=True)  # of another method under this name
    for block in blocks:
        _put_block(run, name, block, chain=chain)
    for block in blocks:
        run.made_table(name, block).unlink(missing_ok=True)
        for made in _made(run, name, block, chain=chain):
            manifest_path(made).unlink(missing_ok=True)
            made.unlink(missing_ok=True)
    for block in blocks[1:]:
        run.variants_log(name, block).unlink(missing_ok=True)
    with suppress(OSError):  # other jobs keep theirs there
        run.made_table(name, 0).parent.rmdir()


def _made(run: Run, name: str, block: int, *, chain: bool) -> dict[Path, Path]:
    """Where tensors of a block are kept, and their places."""
    states = {run.made_state(name, block): run.chain_state(name, block)} if chain else {}
    return {run.made_tensors(name, block): run.variant_tensors(name, block), **states}


def _put_block(run: Run, name: str, block: int, *, chain: bool) -> None:
    """Put the tensors of a block in their places, and then its table."""
    made, table = run.made_table(name, block), run.variant_table(name, block)
    if not made.exists() and table.exists():
        return  # another job that was let loose on the same blocks has done so
    table.unlink(missing_ok=True)
    for source, place in _made(run, name, block, chain=chain).items():
        with atomic_files(place, manifest_path(place)) as (temporary, manifest):
            _take(source, temporary)
            _take(manifest_path(source), manifest)
    with atomic_file(table) as temporary:
        _take(made, temporary)


def _take(source: Path, temporary: Path) -> None:
    """Put a second name of ``source`` in the place of a temporary file; move it where the disk knows no such names."""
    temporary.unlink()
    try:
        temporary.hardlink_to(source)
    except OSError:
        source.replace(temporary)
