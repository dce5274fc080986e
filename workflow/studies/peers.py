"""llama.cpp's own quantizer beside ours: size of the file against divergence from the dense model.

Both start from the same weights and the same calibration text. Every file of llama.cpp is read back and measured as the
model of a search is; `studies.rivals` then searches at exactly its size.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from gguf import GGMLQuantizationType

from evopress.artifacts.atomic import atomic_file, write_text
from evopress.artifacts.manifest import load_manifest
from evopress.artifacts.model_facts import read_model_facts
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import LLAMA_CPP, PEERS, read_provenance, read_table, write_table
from evopress.config.context import StageContext
from evopress.evaluation.perplexity import measure_folder
from evopress.export.gguf.file import write_gguf
from evopress.export.gguf.imatrix import imatrix_of, write_imatrix
from evopress.models.checkpoint import Checkpoint
from evopress.models.dequantize import dequantize
from evopress.models.gguf_header import whole_header
from evopress.models.skeleton import load_config, stored_dtype
from evopress.models.verify import check_model
from evopress.util.progress import log
from evopress.util.text import columns
from studies.paths import dense_gguf_path, imatrix_path, peer_file_path, peer_path, peers_path, rival_path, text_path
from studies.quantizer import Quantizer
from studies.settings import PeerSettings, find_program
from studies.tables import Rows

_KINDS = {
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float16: GGMLQuantizationType.F16,
    torch.float32: GGMLQuantizationType.F32,
}


def write_sources(context: StageContext) -> None:
    """Write what the quantizer reads: the dense model as a GGUF file, without loss, and importances in both forms.

    Raises:
        ArtifactError: the model or its Hessians are missing or damaged.
        UnsupportedArchitectureError: llama.cpp has no code that computes this model.
    """
    run = context.run
    check_model(run)
    imatrix = imatrix_of(run)
    write_imatrix(imatrix, imatrix_path(run))
    write_imatrix(imatrix, imatrix_path(run).with_suffix(".dat"), "dat")
    facts, dense = read_model_facts(run), _KINDS[weights_dtype(run)]
    with atomic_file(dense_gguf_path(run)) as new:
        write_gguf(run.model, new, {}, name=facts.name, card=facts.card, dense=dense)


def weights_dtype(run: Run) -> torch.dtype:
    """Of the dense model's weights."""
    return stored_dtype(load_config(run.model), Checkpoint(run.model))


def quantize_peer(context: StageContext, peer: PeerSettings) -> None:
    """Let llama.cpp's quantizer make one file.

    Raises:
        ConfigError: there is no such program.
        ModelError: it fails.
    """
    run = context.run
    target = peer_file_path(run, peer.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    program = Quantizer(find_program(peer.quantizer))
    threads = context.compute.threads or torch.get_num_threads()
    program.quantize(dense_gguf_path(run), target, peer.type, peer.embedding, imatrix_path(run), threads)


def measure_peer(context: StageContext, peer: PeerSettings, datasets: Sequence[str]) -> None:
    """Read a file of llama.cpp back, and measure it as the model of a search is measured.

    Raises:
        ArtifactError: tokens or the dense hidden states are missing, damaged or of another model.
        ModelError: the file holds what only a fork of llama.cpp knows, or gives NaN.
    """
    run, path = context.run, peer_file_path(context.run, peer.name)
    embedding = GGMLQuantizationType(whole_header(path).tensors["token_embd.weight"].kind).name
    target = peer_path(run, peer.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{peer.name}.") as folder:
        dequantize(path, Path(folder), weights_dtype(run))
        found = measure_folder(context, Path(folder), peer.name, datasets)
    write_measured(run, target, measured_rows(found, peer, embedding, LLAMA_CPP, path.stat().st_size), peer)


def compare_peers(context: StageContext, peers: Sequence[str], against: str | None = None) -> None:
    """Write the table of all files below the size of the model's own file, and the same as text beside it.

    Args:
        context: of the run.
        peers: names of the files.
        against: name of the search that they are compared with.

    Raises:
        ArtifactError: a table is missing, damaged or of another model.
    """
    run = context.run
    tables = [read_measured(run, peer_path(run, peer)) for peer in peers]
    if against is not None:
        tables += [read_measured(run, rival_path(run, peer)) for peer in peers]
    table = pd.concat(tables, ignore_index=True)
    kept = set(_distinct(run, table[table["maker"] == LLAMA_CPP]))
    table = table[table["peer"].isin(kept)].sort_values(["dataset", "bytes", "peer"], kind="stable")
    settings = json.dumps({"peers": list(peers), "against": against})
    write_table(table, peers_path(run), PEERS, Provenance("peers", settings, read_model_fingerprint(run)))
    title = "Files of llama.cpp's quantizer, and searches at their sizes; smallest first"
    write_text(text_path(peers_path(run)), f"{title}\n\n{columns(peers_rows(table))}\n\n{peers_findings(table)}\n")


def _distinct(run: Run, table: pd.DataFrame) -> Iterator[str]:
    """Files that are smaller than the model's own, each once: some mixtures are the same for some models."""
    seen: set[tuple[object, ...]] = set()
    for peer, rows in table.groupby("peer", sort=False):
        size, same = int(rows["bytes"].iloc[0]), (*rows["bytes"], *rows["kl"], *rows["perplexity"])
        if not is_smaller(run, size):
            log.info("%s: %.1f MB is not below the size of the model's own file; left out", peer, size / 1e6)
        elif same in seen:
            log.info("%s: is the same file as another", peer)
        else:
            seen.add(same)
            yield str(peer)


def is_smaller(run: Run, size: int) -> bool:
    """Whether a file is smaller than the one that the model came in, where that was a GGUF file."""
    whole = load_manifest(run.model_manifest, "model").get("origin", {}).get("gguf_bytes")
    return whole is None or size < int(whole)


def peers_rows(table: pd.DataFrame) -> Rows:
    """One row of text for each file and data set: llama.cpp's, and what a search has found at its size.

    Args:
        table: columns of PEERS.
    """
    rows: Rows = [["type", "embedding", "text", "MB", "KL", "perplexity", "ours, MB", "KL", "perplexity", "KL, ratio"]]
    for peer, rival in _pairs(table):
        facts = [peer["type"], peer["embedding"], peer["dataset"], *_measured(peer)]
        ratio = f"{rival['kl'] / peer['kl']:.2f}" if rival is not None and peer["kl"] else "-"
        rows.append([*facts, *(_measured(rival) if rival is not None else ["-"] * 3), ratio])
    return rows


def _measured(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['bytes'] / 1e6:.2f}", f"{row['kl']:.4f}", f"{row['perplexity']:.2f}"]


def _pairs(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each file of llama.cpp, and the row of the search at its size."""
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    ours = {(row["peer"], row["dataset"]): row for row in rows if row["maker"] != LLAMA_CPP}
    for row in rows:
        if row["maker"] == LLAMA_CPP:
            yield row, ours.get((row["peer"], row["dataset"]))


def peers_findings(table: pd.DataFrame) -> str:
    """One sentence: at how many sizes a search is closer to the dense model, and by how much.

    Args:
        table: columns of PEERS.
    """
    pairs = [(peer, rival) for peer, rival in _pairs(table) if rival is not None]
    if not pairs:
        return f"{int((table['maker'] == LLAMA_CPP).sum())} files of llama.cpp; no search to compare them with."
    less = sum(rival["kl"] < peer["kl"] for peer, rival in pairs)
    third = sum(rival["kl"] <= peer["kl"] * 2 / 3 for peer, rival in pairs)
    within = sum(rival["bytes"] <= peer["bytes"] for peer, rival in pairs)
    return (
        f"Ours has less KL in {less} of {len(pairs)} comparisons, by a third or more in {third}; its file is no larger "
        f"in {within}."
    )


def measured_rows(found: pd.DataFrame, peer: PeerSettings, embedding: str, maker: str, size: int) -> pd.DataFrame:
    """Columns of PEERS from those of PERPLEXITY."""
    table = found.assign(peer=peer.name, type=peer.type, embedding=embedding, maker=maker, bytes=size)
    return table[PEERS.names]


def write_measured(run: Run, path: Path, table: pd.DataFrame, peer: PeerSettings) -> None:
    """Write the rows of one file (columns of PEERS)."""
    write_table(table, path, PEERS, Provenance("peers", peer.model_dump_json(), read_model_fingerprint(run)))


def read_measured(run: Run, path: Path) -> pd.DataFrame:
    """Rows of one file (columns of PEERS).

    Raises:
        ArtifactError: missing, damaged or of another model.
    """
    require_same_model(run, read_provenance(path), path)
    return read_table(path, PEERS)
