"""`python -m evopress verify`: read every file of a run again and compare it with its checksum."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from evopress.artifacts.exports import load_export_manifest
from evopress.artifacts.manifest import damaged_files, remade_with
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.tables import LAYERS, read_provenance, read_table
from evopress.artifacts.tensors import verify_tensors
from evopress.models.verify import verify_model
from evopress.util.errors import ArtifactError, EvopressError
from evopress.util.progress import progress

Check = Callable[[Path], Iterable[EvopressError]]
"""Looks at one artifact; raises or returns what is wrong with it."""
_TENSORS = ("hessians/**/block_*", "variants/**/block_*", "search/*/polished/block_*", "evaluation/dense/hidden_*")
_POLISHED = "search/*/polished/effort.parquet"
"""Written once all blocks are there."""


def verify(run: Run) -> None:
    """Print what is wrong with each damaged or missing file.

    Raises:
        ArtifactError: there are such files, or no run.
    """
    checks = list(checks_of(run))
    if not checks:
        raise ArtifactError(f"{run.root}: holds no results; give the folder of a run, results/<name>")
    found = 0
    with progress("verify", len(checks), "artifacts") as bar:
        for path, check in checks:
            for problem in _problems(path, check):
                print(problem)
                found += 1
            bar.advance()
    if found:
        raise ArtifactError(f"{run.root}: {found} of {len(checks)} artifacts are damaged or missing")
    print(f"{run.root}: {len(checks)} artifacts are as they were written")


def checks_of(run: Run) -> Iterator[tuple[Path, Check]]:
    """Each artifact that is there, or that another one says must be there, and how to check it."""
    tensors = {path.with_suffix(".safetensors") for pattern in _TENSORS for path in _written(run.root, pattern)}
    tensors -= {path for path in tensors if path.parent.name == "chain" and not path.exists()}  # removed after use
    tables = {path for path in run.root.rglob("*.parquet") if not path.name.startswith(".")}
    tables |= {
        path.with_suffix(".parquet")
        for path in tensors
        if path.parent.parent == run.root / "variants" or path.parent.name == "polished"
    }
    polished = dict(_polished(run))
    tensors |= {path for path in polished if path.suffix == ".safetensors"}
    tables |= polished.keys() - tensors
    if tables or tensors or run.model_manifest.exists():
        yield run.model_manifest, lambda path: verify_model(run)
        yield from ((path, _raising(read_provenance, polished.get(path))) for path in sorted(tables))
        yield from ((path, _raising(verify_tensors, polished.get(path))) for path in sorted(tensors))
    yield from ((path, _exported) for path in sorted((run.root / "exports").glob("*/*.json")))


def _written(root: Path, pattern: str) -> Iterator[Path]:
    """Files of tensors, and manifests, since of either the other is missed."""
    return (path for suffix in (".json", ".safetensors") for path in root.glob(pattern + suffix))


def _polished(run: Run) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Tensors and tables of all blocks where a polish has ended, each with the arguments of `remade_with`."""
    ended = list(run.root.glob(_POLISHED))
    try:
        blocks = read_table(run.layers, LAYERS)["block"].unique().tolist() if ended else []
    except ArtifactError:  # named by its own check where it is damaged
        return
    for effort in ended:
        search = effort.parent.parent.name
        for block in blocks:
            tensors, table = run.polished_tensors(search, block), run.polished_table(search, block)
            yield tensors, (effort, tensors, manifest_path(tensors))
            yield table, (effort, table)


def _problems(path: Path, check: Check) -> list[EvopressError]:
    try:
        return list(check(path))
    except EvopressError as error:
        return [error]


def _raising(read: Callable[[Path], object], remade: tuple[Path, ...] | None = None) -> Check:
    """A check by a function that raises, with the arguments of `remade_with` for what is no output by itself."""

    def check(path: Path) -> tuple[()]:
        """No error, or the one that is raised."""
        with remade_with(*remade) if remade else nullcontext():
            read(path)
        return ()

    return check


def _exported(manifest: Path) -> Iterable[EvopressError]:
    files = load_export_manifest(manifest)["files"]
    return damaged_files(manifest.with_suffix(""), files, manifest, content=True)
