"""The polish stage: the levels that a search chose are made once more, in sequence, block after block.

Variants are made before anyone knows which of them will stand together, so their Hessians are those of the dense model.
Once levels are chosen, each block can be calibrated on what it really gets: what the polished blocks before it return
(as GPTQ's authors do, arXiv 2210.17323, section 4). Levels, and so budgets and sizes, stay as they are.

One job makes all blocks. Each is written when it is done, and with it the hidden states after it, from which a job that
was killed goes on; it ends with the same bytes.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from shutil import rmtree

import pandas as pd
from torch import Tensor

from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import EMBEDDING, Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import EFFORT, LAYERS, read_provenance, read_table, write_table
from evopress.artifacts.tensors import facts_made_by, read_tensors, write_tensors
from evopress.compression.asymmetric import InputStatistics, observe_both
from evopress.compression.base import LayerMethod, Variant
from evopress.compression.block_files import variant_table, write_packed
from evopress.compression.hessian import embed, observe_block
from evopress.compression.layers import layer_shapes
from evopress.compression.sequential import advance, calibration_facts, unpacked
from evopress.compression.stage import compress_layers
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.data.tokens import read_tokens
from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.models.verify import check_model
from evopress.search.base import Polish
from evopress.search.configuration import Configuration
from evopress.search.evaluation import Effort, effort_table
from evopress.util.errors import ArtifactError, CompressionError
from evopress.util.progress import log, progress

_DAMPING = 0.01
"""Of the Hessian, where the method has no damping of its own."""


def polish(context: StageContext, search: str, how: Polish, method: LayerMethod) -> None:
    """Make what ``search`` chose once more; write ``run.polished_tensors`` and ``.polished_table`` of every block.

    ``run.polish_effort`` is written last. Layers that no level was chosen for stay dense.

    Args:
        context: of the stage.
        search: name of the search.
        how: `sequential` aims at the outputs of the dense weights for the inputs of the polished model, `asymmetric` at
            those that the layer has in the dense model.
        method: made the variants that the search picked from.

    Raises:
        ArtifactError: configuration, tokens or layers are missing, damaged or of another model; the disk is full.
        CompressionError: a layer cannot be compressed as asked; the message names it.
        ModelError: a weight cannot be read.
    """
    run = context.run
    chosen = Configuration.read(run, search).table.set_index("unit")
    layers = read_table(run.layers, LAYERS)
    layers = layers[layers["name"].isin(chosen.index)]
    _require_levels(layers, chosen, method)
    tokens = read_tokens(run, "calibration")
    check_model(run)
    model = BlockwiseModel.from_folder(
        run.model, context.device, resident=False, quick=True, trust_remote_code=context.trust_remote_code
    )
    settings = json.dumps({"polish": how, **method.model_dump(mode="json")})
    provenance = Provenance("polish", settings, read_model_fingerprint(run), key=context.key)
    facts = {**calibration_facts(run, tokens), "configuration_sha256": sha256(run.configuration(search))}
    resume = _Resume(run, search, provenance, facts)
    embedding = _embedding(run, chosen, model)
    states = resume.load() or _States.before(model, tokens, embedding, asymmetric=how == "asymmetric")
    inputs = model.embed(tokens[:1])[1]
    with progress(f"polish {search}", len(model.blocks), "blocks") as bar:
        bar.advance(states.block)
        for block in range(states.block, len(model.blocks)):
            started = time.monotonic()
            own = layers[layers["block"] == block]
            model.load_block(block)
            made = _polish_block(context, model, states, inputs, own, chosen.loc[own["name"]], method, search)
            model.unload_block(block)
            table = variant_table(made, own, method)
            paths = run.polished_tensors(search, block), run.polished_table(search, block)
            write_packed(*paths, made, table, provenance, facts)
            states.seconds += time.monotonic() - started
            resume.save(states)
            bar.advance()
    effort = Effort(tokens.numel(), states.seconds)
    write_table(effort_table(effort), run.polish_effort(search), EFFORT, provenance)
    resume.remove()
    log.info("polish %s: %d layers of %d blocks in %.0f s", search, len(layers), len(model.blocks), states.seconds)


def _embedding(run: Run, chosen: pd.DataFrame, model: BlockwiseModel) -> Tensor | None:
    """Weight [V, H] of the input embedding at its level, which stays as it is; None where it has no level."""
    rows = chosen[chosen["layer"] == EMBEDDING]
    if rows.empty:
        return None
    row = rows.iloc[0]
    store = VariantStore(run, str(row["variants"]), verify=True)
    return store.weight(int(row["block"]), EMBEDDING, str(row["level"]), model.device, model.stored).to(model.dtype)


def _require_levels(layers: pd.DataFrame, chosen: pd.DataFrame, method: LayerMethod) -> None:
    """Check that the method makes the level that was chosen for each layer.

    Raises:
        CompressionError: it does not; the message names the first such layer.
    """
    for shape in layer_shapes(layers, itemsize=0):  # which levels there are does not depend on the bytes of weights
        labels = [level.label for level in method.levels_of(shape)]
        if (level := str(chosen.at[shape.name, "level"])) not in labels:
            raise CompressionError(
                f"{shape.name}: {method.method} as it is set makes no level {level}, which the search chose, but "
                f"{', '.join(labels)}; run the search again"
            )


@dataclass
class _States:
    """Hidden states [S, L, H] of the calibration tokens before a block, on the host."""

    hidden: Tensor
    """Of the polished model."""
    dense: Tensor | None
    """Of the dense model, where it is compared."""
    block: int = 0
    """The next one."""
    seconds: float = 0.0
    """Spent so far."""

    @classmethod
    def before(cls, model: BlockwiseModel, tokens: Tensor, embedding: Tensor | None, *, asymmetric: bool) -> "_States":
        """Before the first block; ``embedding`` [V, H] is that of the polished model, where it has its own."""
        return cls(embed(model, tokens, embedding)[0], embed(model, tokens)[0] if asymmetric else None)


def _polish_block(
    context: StageContext,
    model: BlockwiseModel,
    states: _States,
    inputs: BlockInputs,
    layers: pd.DataFrame,
    chosen: pd.DataFrame,
    method: LayerMethod,
    search: str,
) -> list[Variant]:
    """Make the chosen level of each layer of a loaded block, and move the states past it.

    Args:
        context: of the stage.
        model: holds the block, dense.
        states: before the block; afterwards, those after it.
        inputs: of the blocks.
        layers: of the block that have a level, rows of LAYERS.
        chosen: their rows of the configuration, in the same order.
        method: makes them.
        search: for messages.
    """
    block = states.block
    damping = getattr(method, "damping", _DAMPING)
    level_of = dict(zip(layers["layer"], chosen["level"], strict=True))
    size_of = dict(zip(layers["layer"], chosen["bytes"], strict=True))
    shapes = dict(zip(layers["layer"], zip(layers["rows"], layers["columns"], strict=True), strict=True))

    def prepare(group: str, weights: Mapping[str, Tensor]) -> tuple[LayerMethod, Mapping[str, Tensor]]:
        """The method with the chosen levels alone, and the weights that it is to come close to."""
        aims = weights
        if states.dense is not None:
            aims = {layer: seen.target(group, weight, damping) for layer, weight in weights.items()}
        return method.limited({level_of[layer] for layer in weights}), aims

    made: list[Variant] = []
    for members in _observed_together(layers, alone=states.dense is not None):
        if states.dense is None:
            seen = InputStatistics(observe_block(model, block, states.hidden, inputs, members, outputs=False), {})
        else:
            weights = unpacked(made, shapes, model)
            seen = observe_both(model, block, states.hidden, states.dense, inputs, members, weights)
        description = f"polish {search}, block {block}"
        variants = compress_layers(context, description, method, members, seen.hessians.__getitem__, prepare)
        made += [variant for variant in variants if variant.level == level_of[variant.layer]]
    for variant in made:
        if variant.bytes > size_of[variant.layer]:  # which may be filled up to where a file goes on
            raise CompressionError(
                f"{model.block_names[block]}.{variant.layer}: takes {variant.bytes} bytes at level {variant.level}, "
                f"and {size_of[variant.layer]} before it was polished; set `polish: none`"
            )
    if block + 1 < len(model.blocks):
        advance(model, block, states.hidden, inputs, unpacked(made, shapes, model))
        if states.dense is not None:
            advance(model, block, states.dense, inputs, {})
    states.block += 1
    return made


def _observed_together(layers: pd.DataFrame, *, alone: bool) -> list[pd.DataFrame]:
    """All layers of a block together, or, in the order in which they run, those of each input group ``alone``."""
    return [members for _, members in layers.groupby("input_group", sort=False)] if alone else [layers]


class _Resume:
    """What a killed polish goes on from: the blocks that are written, and the hidden states after the last of them."""

    def __init__(self, run: Run, search: str, provenance: Provenance, facts: Mapping[str, object]) -> None:
        """Look after the polish of ``search`` that ``provenance`` and ``facts`` identify."""
        self.run, self.search, self.provenance, self.facts = run, search, provenance, facts
        self.path = run.polish_state(search)

    def save(self, states: _States) -> None:
        """Keep the states after a block that is written.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        tensors = {"hidden": states.hidden} | ({} if states.dense is None else {"dense": states.dense})
        facts = {**self.facts, "block": states.block, "seconds": states.seconds}
        write_tensors(tensors, self.path, self.provenance, facts)

    def load(self) -> _States | None:
        """The states after the last block that is written; None where there is nothing whole to go on from."""
        if not self.path.exists():
            return None
        try:
            found = facts_made_by(self.path, self.provenance, self.facts)
            block = int(found["block"])
            for number in range(block):
                facts_made_by(self.run.polished_tensors(self.search, number), self.provenance, self.facts)
                if read_provenance(self.run.polished_table(self.search, number)) != self.provenance:
                    raise ArtifactError("its table was made by other settings")
            tensors = read_tensors(self.path)
        except (ArtifactError, KeyError) as error:
            log.info("%s: nothing to go on from (%s); starting anew", self.path, error)
            return None
        log.info("polish %s: going on with block %d", self.search, block)
        return _States(tensors["hidden"], tensors.get("dense"), block, float(found["seconds"]))

    def remove(self) -> None:
        """Forget the states; all blocks are written."""
        rmtree(self.path.parent, ignore_errors=True)
