"""Where the tables of studies lie under results/<name>/; imports nothing heavy, since every cluster job parses it."""

from pathlib import Path

from evopress.artifacts.paths import Run


def comparison_path(run: Run) -> Path:
    """Mean and spread of all that was measured, of searches that only differ in their seed."""
    return run.root / "comparison.parquet"


def convergence_path(run: Run) -> Path:
    """Generations to the optimum of linear objectives."""
    return run.root / "convergence.parquet"


def candidates_path(run: Run, study: str) -> Path:
    """Candidates of a study of monotonicity, with their summed errors and their fitness."""
    return run.root / "monotonicity" / study / "candidates.parquet"


def pairs_path(run: Run, study: str) -> Path:
    """Pairs of these candidates of which the one that should be better is worse."""
    return run.root / "monotonicity" / study / "pairs.parquet"


def dense_gguf_path(run: Run) -> Path:
    """The dense model as one GGUF file, which llama.cpp's quantizer reads."""
    return run.root / "peers" / "dense.gguf"


def imatrix_path(run: Run) -> Path:
    """Importances of the calibration text in GGUF; beside it, as `.dat`, the same in the form of before 2025."""
    return run.root / "peers" / "imatrix.gguf"


def peer_file_path(run: Run, peer: str) -> Path:
    """What llama.cpp's quantizer has made."""
    return run.root / "peers" / "files" / f"{peer}.gguf"


def peer_path(run: Run, peer: str) -> Path:
    """That file, measured."""
    return run.root / "peers" / "measured" / f"{peer}.parquet"


def rival_name(peer: str) -> str:
    """Name of the search at the size of that file."""
    return f"peers-{peer}"


def rival_path(run: Run, peer: str) -> Path:
    """What a search has found at the size of that file, measured."""
    return run.root / "peers" / "searched" / f"{peer}.parquet"


def peers_path(run: Run) -> Path:
    """All of them."""
    return run.root / "peers" / "peers.parquet"


def sections_path(run: Run) -> Path:
    """Sections that the studies of a run add to its report."""
    return run.root / "sections" / "studies.parquet"


def text_path(table: Path) -> Path:
    """What a table says, as text for the terminal, beside it."""
    return table.with_suffix(".txt")
