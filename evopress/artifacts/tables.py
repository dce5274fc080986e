"""Parquet tables with a fixed schema, a checksum and provenance."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from evopress.artifacts.atomic import atomic_file
from evopress.artifacts.manifest import damaged
from evopress.artifacts.provenance import PROVENANCE_KEY, Provenance
from evopress.util.errors import ArtifactError

LAYERS = pa.schema(
    [
        pa.field("block", pa.int32(), metadata={"about": "index of the transformer block"}),
        pa.field("layer", pa.string(), metadata={"about": "name inside the block, as in self_attn.q_proj"}),
        pa.field("name", pa.string(), metadata={"about": "name in the model, as in model.layers.0.self_attn.q_proj"}),
        pa.field("kind", pa.string(), metadata={"about": "last part of the name, as in q_proj"}),
        pa.field("module", pa.string(), metadata={"about": "attn or mlp"}),
        pa.field(
            "input_group", pa.string(), metadata={"about": "layer (inside the block) whose input this one shares"}
        ),
        pa.field("rows", pa.int64(), metadata={"about": "output features"}),
        pa.field("columns", pa.int64(), metadata={"about": "input features"}),
        pa.field("parameters", pa.int64(), metadata={"about": "rows x columns"}),
    ]
)

TOKENS = pa.schema(
    [
        pa.field("sequence", pa.int32()),
        pa.field("documents", pa.list_(pa.string()), metadata={"about": "documents that the tokens come from"}),
        pa.field("tokens", pa.list_(pa.int32())),
        pa.field(
            "starts",
            pa.list_(pa.int32()),
            metadata={"about": "positions of start tokens, which no token before them is to predict"},
        ),
    ]
)

VARIANTS = pa.schema(
    [
        pa.field("block", pa.int32()),
        pa.field("layer", pa.string()),
        pa.field("name", pa.string()),
        pa.field("family", pa.string(), metadata={"about": "what levels count: bits, sparsity, modules"}),
        pa.field("level", pa.string(), metadata={"about": "label; tensors are stored under layer/level/part"}),
        pa.field("value", pa.float64(), metadata={"about": "bits, or sparsity"}),
        pa.field("cost", pa.int64(), metadata={"about": "what the budget counts, as in bits x weights"}),
        pa.field("parameters", pa.int64()),
        pa.field("bits_per_weight", pa.float64(), metadata={"about": "with scales, zeros or bitmask"}),
        pa.field("bytes", pa.int64(), metadata={"about": "exact size of the stored tensors"}),
        pa.field("error", pa.float64(), metadata={"about": "tr(dW H dW') / tr(W H W')"}),
        pa.field("damping", pa.float64(), metadata={"about": "damping with which Cholesky succeeded"}),
        pa.field("format", pa.string(), metadata={"about": "how the tensors decode (compression/formats)"}),
    ]
)

MODULES = pa.schema(
    [
        pa.field("block", pa.int32()),
        pa.field("module", pa.string(), metadata={"about": "attn or mlp"}),
        pa.field("name", pa.string(), metadata={"about": "name of the module, as in model.layers.0.attn"}),
        pa.field("unit", pa.string(), metadata={"about": "what it is dropped with: itself, its block or a pair"}),
        pa.field("family", pa.string(), metadata={"about": "what levels count: bits, sparsity, modules"}),
        pa.field("parameters", pa.int64(), metadata={"about": "weights of its linear layers"}),
        pa.field("bytes", pa.int64(), metadata={"about": "size of these weights in the dense model"}),
    ]
)

CONFIGURATION = pa.schema(
    [
        pa.field(
            "unit",
            pa.string(),
            metadata={"about": "layer or module, as in model.layers.0.self_attn.q_proj, model.layers.0.attn"},
        ),
        pa.field("block", pa.int32()),
        pa.field("layer", pa.string(), metadata={"about": "name inside the block; attn or mlp for a module"}),
        pa.field("variants", pa.string(), metadata={"about": "folder of variants that the level comes from"}),
        pa.field("family", pa.string(), metadata={"about": "what levels count: bits, sparsity, modules"}),
        pa.field("level", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("cost", pa.int64()),
        pa.field("parameters", pa.int64()),
        pa.field("bytes", pa.int64()),
    ]
)

TRACE = pa.schema(
    [
        pa.field("generation", pa.int32(), metadata={"about": "0 is the choice of the initial candidate"}),
        pa.field("step", pa.int32()),
        pa.field("candidate", pa.int32(), metadata={"about": "number within the generation; parents are -1, -2, ..."}),
        pa.field("tokens", pa.int64(), metadata={"about": "tokens that this evaluation ran; 0 if it was remembered"}),
        pa.field("fitness", pa.float64(), metadata={"about": "lower is better"}),
        pa.field("fitness_by_sequence", pa.list_(pa.float64())),
        pa.field("sequences", pa.list_(pa.int32()), metadata={"about": "rows of tokens/search.parquet"}),
        pa.field("accepted", pa.bool_(), metadata={"about": "became a parent of the next generation"}),
    ]
)

EFFECTS = pa.schema(
    [
        pa.field("unit", pa.string(), metadata={"about": "the one that is compressed, all others being dense"}),
        pa.field("level", pa.string(), metadata={"about": "label of its level"}),
        pa.field("fitness", pa.float64(), metadata={"about": "by how much it is worse than the dense model's"}),
        pa.field("hidden_error", pa.float64(), metadata={"about": "of final hidden states, relative; NaN if unknown"}),
    ]
)

PROGRESS = pa.schema(
    [
        pa.field("candidate", pa.string(), metadata={"about": "the best so far, or the uniform choice beside it"}),
        pa.field("generation", pa.int32(), metadata={"about": "in which it became the best, and the last of all"}),
        pa.field("tokens", pa.int64(), metadata={"about": "candidate tokens that had been judged by its end"}),
        pa.field("seconds", pa.float64(), metadata={"about": "that had passed by its end"}),
        pa.field("fitness", pa.float64(), metadata={"about": "on a fixed part of the text; NaN where it was left out"}),
        pa.field("part", pa.int64(), metadata={"about": "tokens of that part"}),
        pa.field("raised", pa.list_(pa.string()), metadata={"about": "units at a higher level than before"}),
        pa.field("lowered", pa.list_(pa.string()), metadata={"about": "units at a lower one"}),
    ]
)

EFFORT = pa.schema(
    [
        pa.field(
            "tokens", pa.int64(), metadata={"about": "candidate tokens judged, with those of what it starts from"}
        ),
        pa.field(
            "seconds", pa.float64(), metadata={"about": "wall time of the same, over all parts of a killed search"}
        ),
    ]
)

PERPLEXITY = pa.schema(
    [
        pa.field("search", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("perplexity", pa.float64()),
        pa.field("kl", pa.float64(), metadata={"about": "mean over tokens of KL(dense || model), nats"}),
        pa.field("kl_stderr", pa.float64(), metadata={"about": "over sequences; NaN of the dense model, and of one"}),
        pa.field("agreement", pa.float64(), metadata={"about": "share of tokens with the dense model's top token"}),
        pa.field("agreement_stderr", pa.float64(), metadata={"about": "over sequences, as kl_stderr"}),
        pa.field("tokens", pa.int64()),
    ]
)

TASKS = pa.schema(
    [
        pa.field("search", pa.string()),
        pa.field("task", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("filter", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("stderr", pa.float64()),
        pa.field("documents", pa.int64()),
    ]
)

RUNTIME = pa.schema(
    [
        pa.field("search", pa.string()),
        pa.field("dataset", pa.string(), metadata={"about": "text of the next four columns"}),
        pa.field("tokens", pa.int64(), metadata={"about": "predicted tokens that were compared"}),
        pa.field("kl", pa.float64(), metadata={"about": "mean over tokens of KL(this package || runtime), nats"}),
        pa.field("perplexity", pa.float64(), metadata={"about": "in the runtime"}),
        pa.field("own_perplexity", pa.float64(), metadata={"about": "of the same tokens, by this package in float32"}),
        pa.field("largest_kl", pa.float64(), metadata={"about": "what kl was allowed to be"}),
        pa.field("file_bytes", pa.int64()),
        pa.field("sha256", pa.string(), metadata={"about": "of the file; empty for that of the dense model"}),
        pa.field("resident_bytes", pa.int64(), metadata={"about": "weights, cache and buffers of a fresh process"}),
        pa.field("prompt_speed", pa.float64(), metadata={"about": "tokens of a prompt per second, median"}),
        pa.field("generation_speed", pa.float64(), metadata={"about": "tokens generated per second, median"}),
        pa.field("prompt_ratio", pa.float64(), metadata={"about": "to the F16 file of the dense model, median"}),
        pa.field("generation_ratio", pa.float64(), metadata={"about": "to the F16 file of the dense model, median"}),
        pa.field("threads", pa.int32()),
        pa.field("runtime", pa.string(), metadata={"about": "name and version"}),
    ]
)

PEERS = pa.schema(
    [
        pa.field("peer", pa.string(), metadata={"about": "file of llama.cpp's quantizer that the row is about"}),
        pa.field("type", pa.string(), metadata={"about": "of that file, as in Q3_K_M"}),
        pa.field("embedding", pa.string(), metadata={"about": "type of the token embedding in that file"}),
        pa.field("maker", pa.string(), metadata={"about": "llama.cpp, or the search that ended at the same size"}),
        pa.field("bytes", pa.int64(), metadata={"about": "of the GGUF file that was measured"}),
        pa.field("dataset", pa.string()),
        pa.field("perplexity", pa.float64()),
        pa.field("kl", pa.float64(), metadata={"about": "from the dense model, nats per token"}),
        pa.field("tokens", pa.int64()),
    ]
)
LLAMA_CPP = "llama.cpp"
"""Maker of the files that llama.cpp's quantizer has made, in PEERS."""

SECTIONS = pa.schema(
    [
        pa.field("title", pa.string(), metadata={"about": "heading in the report"}),
        pa.field("html", pa.string(), metadata={"about": "what stands below it (report/sections.py)"}),
    ]
)

_PROVENANCE = PROVENANCE_KEY.encode()
_DIGEST = b"evopress.sha256"
"""Key, in the file's own metadata, of the sha256 of the whole file with this digest's place filled with zeros.

Parquet's page checksums do not cover the footer, where a changed bit may well go unnoticed and give other numbers.
"""
_BLANK = b"0" * 64


def write_table(frame: pd.DataFrame, path: Path, schema: pa.Schema, provenance: Provenance) -> None:
    """Write ``frame`` with exactly the columns of ``schema``.

    Raises:
        ArtifactError: the table cannot be written.
    """
    with atomic_file(path) as temporary:
        save_table(frame, temporary, schema, provenance)


def save_table(frame: pd.DataFrame, path: Path, schema: pa.Schema, provenance: Provenance) -> None:
    """Write a table in place; for use inside an atomic write, which explains an OSError.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata({_PROVENANCE: provenance.dumps().encode()})
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_DIGEST: _BLANK})
    content = bytearray(buffer.getvalue())
    content[_digest_place(content)] = _digest(content)
    path.write_bytes(content)


def read_table(path: Path, schema: pa.Schema) -> pd.DataFrame:
    """Read a table and check its digest and columns.

    Raises:
        ArtifactError: missing, or of another schema.
        DamagedError: cut short or changed.
    """
    table = _read(path)
    if table.schema.names != schema.names:
        raise ArtifactError(
            f"{path}: has columns {table.schema.names}, expected {schema.names}; delete it and run again"
        )
    if table.schema.types != schema.types:
        raise ArtifactError(f"{path}: has columns of other types than expected; delete it and run again")
    try:
        return table.to_pandas()
    except (pa.ArrowException, ValueError) as error:  # text that is no UTF-8, say
        raise damaged(path, error) from error


def read_provenance(path: Path) -> Provenance:
    """Provenance of a table.

    Raises:
        ArtifactError: missing, or not written by evopress.
        DamagedError: cut short or changed.
    """
    metadata = _read(path, columns=[]).schema.metadata or {}
    try:
        return Provenance.loads(metadata[_PROVENANCE].decode())
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: no readable provenance ({error!r}); delete it and run again") from error


def settings_of(path: Path) -> dict[str, Any]:
    """Settings that made a table, as it records them.

    Raises:
        ArtifactError: it has no readable provenance.
    """
    return json.loads(read_provenance(path).settings)


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """What a file holds, after a check of all its bytes; nothing of it is interpreted before."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run the stage that writes it") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions") from error
    if content[_digest_place(content)] != _digest(content):
        raise damaged(path, "differs from its checksum, or has none")
    try:
        return pq.read_table(pa.BufferReader(content), columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _digest_place(content: bytes | bytearray) -> slice:
    """Where the digest stands: after its key, a byte for the type of its field and one for its length."""
    start = content.rfind(_DIGEST) + len(_DIGEST) + 2
    return slice(start, start + len(_BLANK))


def _digest(content: bytes | bytearray) -> bytes:
    place, view = _digest_place(content), memoryview(content)
    digest = hashlib.sha256(view[: place.start])
    digest.update(_BLANK)
    digest.update(view[place.stop :])
    return digest.hexdigest().encode()
