"""The Hessians stage: X^T X of every distinct layer input, accumulated block by block over the calibration tokens.

The Hessian of a layer's squared output error with respect to one row of its weights is 2 X^T X; the factor is left out.
Plain sums add up over token shards. Each block gets the dense model's activations, so blocks do not depend on how those
before them will be compressed.
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from evopress.artifacts.paths import EMBEDDING, Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import LAYERS, read_provenance, read_table
from evopress.artifacts.tensors import read_manifest, read_tensors, write_tensors
from evopress.config.context import StageContext
from evopress.config.data import HessianSettings
from evopress.data.tokens import read_tokens
from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.models.modules import HEAD
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, CompressionError, ConfigError
from evopress.util.progress import log, progress

_PANEL = 256
"""Columns of a panel of the symmetric product; narrower saves more of the lower triangle but multiplies slower."""
_CUDA_PANEL = 2048
"""The same for tensor cores, which narrow products leave idle."""
TOKENS_AT_ONCE = 4096
"""Tokens run through a block together, at most (but at least one sequence)."""


def accumulate(hessian: Tensor, inputs: Tensor) -> None:
    """Add X^T X to the upper triangle of ``hessian`` in place; `symmetrize` fills in the rest once at the end.

    Args:
        hessian: float32 [columns, columns].
        inputs: layer inputs X of any floating type, [..., columns]; products are summed in float32. Those of 16-bit
            numbers are exact in it, and CUDA's tensor cores make them so without widening the numbers before.
    """
    x = inputs.flatten(0, -2)
    narrow = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    x, panel = (x, _CUDA_PANEL) if narrow else (x.float(), _PANEL)
    for start in range(0, x.shape[1], panel):
        part, rest = x[:, start : start + panel].t(), x[:, start:]
        if narrow:
            hessian[start : start + panel, start:] += torch.mm(part, rest, out_dtype=torch.float32)
        else:
            hessian[start : start + panel, start:].addmm_(part, rest)


def symmetrize(hessian: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of ``hessian``."""
    return hessian.triu() + hessian.triu(1).t()


def accumulate_hessians(context: StageContext, settings: HessianSettings, shard: int) -> None:
    """Accumulate the Hessians of all blocks over one shard of the calibration tokens, and write each block's when done.

    That of the head's input comes last.

    With a single shard the files are those that the variants read; otherwise `sum_hessians` adds the shards up.

    Raises:
        ArtifactError: model, layers or tokens are missing, damaged or of another model; the disk is full.
        CompressionError: an input of a layer is not finite; the message names the layer.
        ConfigError: there are more shards than sequences.
    """
    run = context.run
    tokens_path = run.tokens("calibration")
    require_same_model(run, read_provenance(tokens_path), tokens_path)
    require_same_model(run, read_provenance(run.layers), run.layers)
    tokens = shard_of(read_tokens(run, "calibration"), shard, settings.shards)
    layers = read_table(run.layers, LAYERS)
    check_model(run)
    model = BlockwiseModel.from_folder(
        run.model, context.device, resident=False, quick=True, trust_remote_code=context.trust_remote_code
    )
    text = json.loads(read_provenance(tokens_path).settings)
    own = settings.model_dump(mode="json", exclude={"keep"})
    made_by = json.dumps({"calibration": text, "hessians": own}, sort_keys=True)
    provenance = Provenance("hessians", made_by, read_model_fingerprint(run))
    facts = {"tokens": tokens.numel(), "sequences": len(tokens)}
    with progress("Hessians", len(model.blocks) + 1, "blocks") as bar:
        for block, hessians in propagate(model, tokens, layers):
            path = run.hessian(block) if settings.shards == 1 else run.hessian_shard(shard, block)
            write_tensors(hessians, path, provenance, facts)
            bar.advance()
    log.info("Hessians of %d blocks from %d tokens (shard %d)", len(model.blocks), tokens.numel(), shard)


def shard_of(tokens: Tensor, shard: int, shards: int) -> Tensor:
    """Contiguous part ``shard`` of ``shards`` nearly equal parts of the sequences [S, L].

    Raises:
        ConfigError: there are fewer sequences than shards.
    """
    if len(tokens) < shards:
        raise ConfigError(f"hessians.shards: {shards} shards of {len(tokens)} calibration sequences; lower it")
    return tokens.tensor_split(shards)[shard]


def propagate(
    model: BlockwiseModel, tokens: Tensor, layers: pd.DataFrame
) -> Iterator[tuple[int | str, dict[str, Tensor]]]:
    """Run ``tokens`` [S, L] through the dense model; after each block, yield its index and its Hessians by input group.

    At the end, yield `EMBEDDING` and the Hessian of the head's input.

    Hidden states wait on the host in the model's dtype; one block's weights are loaded at a time.

    Raises:
        CompressionError: an input of a layer is not finite.
    """
    hidden, inputs = embed(model, tokens)
    for block in range(len(model.blocks)):
        model.load_block(block)
        yield block, observe_block(model, block, hidden, inputs, layers[layers["block"] == block])
        model.unload_block(block)
    yield EMBEDDING, {HEAD: observe_head(model, hidden)}


def embed(model: BlockwiseModel, tokens: Tensor, weight: Tensor | None = None) -> tuple[Tensor, BlockInputs]:
    """Hidden states [S, L, H] before the first block, on the host, and the inputs of the blocks.

    ``weight`` [V, H] takes the place of that of the input embedding.
    """
    hidden = torch.empty(*tokens.shape, model.hidden_size, dtype=model.dtype)
    size = batch_size(tokens)
    for part, ids in zip(hidden.split(size), tokens.split(size), strict=True):
        part.copy_(model.embed(ids, weight)[0])
    return hidden, model.embed(tokens[:1])[1]


def batch_size(sequences: Tensor, inputs: BlockInputs | None = None) -> int:
    """Sequences [S, L, ...] that pass a block together: one, where its ``inputs`` are for one alone."""
    return 1 if inputs is not None and inputs.alone else max(1, TOKENS_AT_ONCE // sequences.shape[1])


def observe_block(
    model: BlockwiseModel,
    block: int,
    hidden: Tensor,
    inputs: BlockInputs,
    layers: pd.DataFrame,
    *,
    outputs: bool = True,
) -> dict[str, Tensor]:
    """Run hidden states through a loaded block and return its Hessians by input group, on the host.

    Args:
        model: runs the block.
        block: index of the block.
        hidden: [S, L, H] on the host; with ``outputs`` it becomes what the block returns. Otherwise the block is left
            as soon as the last input is known.
        inputs: of the blocks, from `embed`.
        layers: rows of the LAYERS schema whose inputs are wanted.
        outputs: whether anything comes after the block.

    Raises:
        CompressionError: an input of a layer is not finite.
    """
    hessians = {name: torch.zeros(width, width, device=model.device) for name, width in input_widths(layers).items()}

    def observe(name: str, inputs: Tensor) -> None:
        """Add the inputs [S, L, columns] of a layer to its Hessian."""
        accumulate(hessians[name], inputs)

    for part in hidden.split(batch_size(hidden, inputs)):
        with watched(model.blocks[block], hessians, observe, stop=not outputs):
            output = model.run_block(block, part.to(model.device), inputs)
            if outputs:
                part.copy_(output)
    return {name: finished(hessian, model.block_names[block], name) for name, hessian in hessians.items()}


def input_widths(layers: pd.DataFrame) -> dict[str, int]:
    """Columns of each input group of ``layers`` (LAYERS schema), by the layer that stands for it."""
    groups = layers.drop_duplicates("input_group")
    return dict(zip(groups["input_group"], groups["columns"], strict=True))


def observe_head(model: BlockwiseModel, hidden: Tensor) -> Tensor:
    """Hessian [H, H] of the head's input, on the host, from hidden states [S, L, H] after the last block.

    Raises:
        CompressionError: an input is not finite.
    """
    hessian = torch.zeros(model.hidden_size, model.hidden_size, device=model.device)
    for part in hidden.split(batch_size(hidden)):
        accumulate(hessian, model.head_inputs(part.to(model.device)))
    return finished(hessian, type(model.model).__name__, HEAD)


class _AllSeen(Exception):  # noqa: N818 (not an error)
    """The inputs of all layers are known; nothing that the block does after is wanted."""


@contextmanager
def watched(
    block: nn.Module, names: Collection[str], observe: Callable[[str, Tensor], None], *, stop: bool
) -> Iterator[None]:
    """Hand the inputs [S, L, columns] of the named layers to ``observe`` while the block runs once.

    With ``stop``, the run ends as soon as the last input is known, and so does the body of the `with` statement.
    """
    seen: set[str] = set()

    def hook(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Called before a layer runs."""
        observe(name, args[0])
        seen.add(name)
        if stop and len(seen) == len(names):
            raise _AllSeen

    handles = [block.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    try:
        with suppress(_AllSeen):
            yield
    finally:
        for handle in handles:
            handle.remove()


def finished(hessian: Tensor, block: str, layer: str) -> Tensor:
    """Whole Hessian on the host, after a check."""
    if not bool(torch.isfinite(hessian).all()):
        raise CompressionError(
            f"{block}.{layer}: NaN or infinity among its inputs; check the model's weights, or take another model.dtype"
        )
    return symmetrize(hessian).cpu()


def sum_hessians(run: Run, block: str, shards: int) -> None:
    """Add up the Hessians of one block (its number, or `EMBEDDING`) over all shards.

    Raises:
        ArtifactError: a shard is missing, damaged, or made by other settings than the first.
    """
    paths = [run.hessian_shard(shard, block) for shard in range(shards)]
    manifests = [read_manifest(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest["provenance"] != manifests[0]["provenance"]:
            raise ArtifactError(f"{path}: made by other settings than {paths[0]}; delete {path.parent} and run again")
    total = read_tensors(paths[0])
    for path in paths[1:]:
        total = {name: total[name] + hessian for name, hessian in read_tensors(path).items()}
    facts = {fact: sum(manifest["facts"][fact] for manifest in manifests) for fact in ("tokens", "sequences")}
    write_tensors(total, run.hessian(block), Provenance(**manifests[0]["provenance"]), facts)
