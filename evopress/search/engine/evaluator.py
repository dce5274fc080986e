"""Opening the evaluator of a search: the model, its variants, the search text, and the dense model's own run on it."""

from collections.abc import Mapping

import torch

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import read_provenance
from evopress.config.compute import ComputeSettings
from evopress.data.tokens import read_counted, read_tokens
from evopress.models.blockwise import BlockwiseModel
from evopress.models.propagation import final_hidden
from evopress.models.verify import check_model
from evopress.search.context import Context
from evopress.search.engine.counters import Counters
from evopress.search.engine.fitness import ModelEvaluator
from evopress.search.engine.forward import Check
from evopress.search.engine.memory import packed_limit, plan_memory
from evopress.search.engine.objectives import Fitness, make_objective
from evopress.search.engine.packed import PackedWeights
from evopress.search.engine.weights import ReadAhead, Unpack, VariantBlocks
from evopress.search.processes.ranks import Ranks, in_parts
from evopress.search.space import Space
from evopress.util.device import resolve_device
from evopress.util.errors import ConfigError


def search_text(run: Run) -> torch.Tensor:
    """Search tokens, [sequences, L].

    Raises:
        ArtifactError: missing, damaged or of another model.
    """
    path = run.tokens("search")
    require_same_model(run, read_provenance(path), path)
    return read_tokens(run, "search")


def require_tokens(asked: Mapping[str, int], available: int, where: str) -> None:
    """Refuse settings that ask for more tokens than the search text has.

    Args:
        asked: tokens, by the name of the setting.
        available: tokens of the search text.
        where: dotted path of the search's settings.

    Raises:
        ConfigError: with the setting and both numbers.
    """
    for name, tokens in asked.items():
        if tokens > available:
            raise ConfigError(
                f"{where}.{name}: asks for {tokens} tokens, but the search text has {available}; lower it, or raise "
                f"data.search.tokens"
            )


def open_evaluator(context: Context, tokens: torch.Tensor, fitness: Fitness, check: Check) -> ModelEvaluator:
    """Load the model and run the dense one on ``tokens``, the search text; all processes call this together.

    Raises:
        ConfigError: as `model_evaluator`.
    """
    compute, device = context.compute, resolve_device(context.compute.device)
    check_model(context.run)
    model = BlockwiseModel.from_folder(
        context.run.model, device, resident=False, quick=True, trust_remote_code=context.trust_remote_code
    )
    counted = read_counted(context.run, "search")
    if context.store is None:
        return model_evaluator(
            model,
            context.space,
            _no_variants,
            tokens,
            fitness,
            compute,
            context.where,
            check,
            counted=counted,
            ranks=context.ranks,
        )
    limit = packed_limit(compute.memory_gb, plan_memory(compute.memory_gb, model, tokens.shape[1]), model)
    packed = PackedWeights(context.store, device, model.stored, model.dtype, limit)
    return model_evaluator(
        model,
        context.space,
        packed.unpack,
        tokens,
        fitness,
        compute,
        context.where,
        check,
        counted=counted,
        read_ahead=packed.read_ahead,
        held=packed.bytes if device.type == "cpu" else 0,
        ranks=context.ranks,
    )


def _no_variants(block: int, layer: str, level: str) -> torch.Tensor:
    raise AssertionError(f"asked for level {level} of {layer} in block {block}, but only modules are dropped")


def model_evaluator(
    model: BlockwiseModel,
    space: Space,
    unpack: Unpack,
    tokens: torch.Tensor,
    fitness: Fitness,
    compute: ComputeSettings,
    where: str,
    check: Check,
    *,
    counted: torch.Tensor | None = None,
    read_ahead: ReadAhead | None = None,
    held: int = 0,
    ranks: Ranks | None = None,
) -> ModelEvaluator:
    """Run the dense model once and make the evaluator of all rounds.

    Args:
        model: with no block loaded.
        space: its units' levels are what ``unpack`` is asked for.
        unpack: gives the weight of a layer at a level.
        tokens: [sequences, L] search tokens.
        fitness: what candidates are judged by.
        compute: memory.
        where: dotted path of the settings, for messages.
        check: raises if the search should stop.
        counted: positions of ``tokens`` that are judged; None are all.
        read_ahead: told what ``unpack`` will be asked for.
        held: bytes of the memory for weights that packed ones take.
        ranks: the processes that share the dense model's run; all call this together.

    Raises:
        ConfigError: the memory is too little, or more top tokens are asked than the vocabulary has.
    """
    if fitness.name == "topk_kl" and fitness.top_k > model.vocab_size:
        raise ConfigError(f"{where}.top_k: {fitness.top_k} is more than the vocabulary has ({model.vocab_size})")
    objective = make_objective(fitness.name, fitness.top_k)
    memory, counters = plan_memory(compute.memory_gb, model, tokens.shape[1]), Counters()
    dense = None
    if objective.needs_teacher:
        dense = in_parts(
            ranks or Ranks(), tokens, lambda rows: final_hidden(model, rows, memory.run_tokens, "dense model", check)
        )
    blocks = VariantBlocks(model, space.units, unpack, memory.weights - held, counters, read_ahead)
    return ModelEvaluator(blocks, tokens, dense, objective, memory, counters, check, counted)
