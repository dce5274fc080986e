"""A model run block by block, with blocks loaded when needed and linear weights replaced at will.

Nothing here knows an architecture. The model's own forward code prepares what blocks get (masks, position embeddings)
and what follows the last block (norm, head, soft-capping), while the blocks between are stood in for.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evopress.models.bypass import Absence, find_absence, left_out
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import modules_of
from evopress.models.skeleton import assign, fill_outside, load_config, skeleton_of, stored_dtype
from evopress.models.structure import find_blocks, linear_layers, surroundings_of, unsupported
from evopress.models.trace import BlockInputs, Surroundings, few_inputs
from evopress.util.device import precise_dtype, working_dtype
from evopress.util.progress import progress

__all__ = ["BlockInputs", "BlockwiseModel", "final_hidden"]


class _HeadReached(Exception):  # noqa: N818 (not an error)
    """The head's input is known; its product is not wanted."""


@contextmanager
def replaced_weight(module: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """Enclose calls of a module with another weight; None leaves its own. What is tied to it keeps that."""
    own = module.weight
    if weight is not None:
        module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module.weight = own


@dataclass
class BlockwiseModel:
    """A causal language model whose blocks are run one at a time."""

    model: PreTrainedModel
    around: Surroundings
    checkpoint: Checkpoint
    blocks: list[nn.Module]
    block_names: list[str]
    """Names of the blocks in the model, as in `model.layers.0`."""
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic."""
    stored: torch.dtype
    """Of the weights as the checkpoint has them: where ``dtype`` is wider, weights are rounded to this one before."""
    _absences: dict[tuple[int, str], Absence] = field(default_factory=dict, repr=False)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        resident: bool = True,
        quick: bool = False,
        precise: bool = False,
        trust_remote_code: bool = False,
    ) -> "BlockwiseModel":
        """Open the model in ``folder``; ``dtype`` None keeps the checkpoint's.

        With ``quick`` it is one that the device has fast arithmetic for (`working_dtype`), with ``precise`` one whose
        rounding hides little (`precise_dtype`); the weights are the same.

        With ``resident`` False the blocks' weights stay on disk until `load_block`; what lies outside the blocks is
        always loaded.

        Raises:
            ModelError: a file is missing or damaged.
            UnsupportedArchitectureError: the blocks cannot be found, or do not run one after the other.
        """
        checkpoint = Checkpoint(folder)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        stored = dtype or stored_dtype(config, checkpoint)
        working = working_dtype(stored, device) if quick else stored
        if precise:
            working = precise_dtype(working)
        skeleton = skeleton_of(config, working, trust_remote_code=trust_remote_code)
        fill_outside(skeleton, find_blocks(skeleton)[0], checkpoint, device)
        name, around = surroundings_of(skeleton)
        names = [f"{name}.{index}" for index in range(len(around.blocks))]
        self = cls(skeleton, around, checkpoint, list(around.blocks), names, device, working, stored)
        self._check_inputs()
        if resident:
            for index in range(len(names)):
                self.load_block(index)
        return self

    @staticmethod
    def stored_in(folder: Path, *, trust_remote_code: bool = False) -> torch.dtype:
        """Type of the weights in ``folder``."""
        return stored_dtype(load_config(folder, trust_remote_code=trust_remote_code), Checkpoint(folder))

    @property
    def config(self) -> Any:
        """The config of the (text) model."""
        return self.model.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Numbers per token between blocks."""
        return self.config.hidden_size

    @property
    def is_tied(self) -> bool:
        """Whether the head has the weight of the input embedding."""
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    @property
    def vocab_size(self) -> int:
        """Logits per token."""
        return self.config.vocab_size

    def load_block(self, index: int, *, linear_weights: bool = True) -> None:
        """Load the weights of a block; those of its linear layers may be left out if `run_block` will be given them.

        Raises:
            ModelError: a tensor is missing, or of another shape.
        """
        block = self.blocks[index]
        skip = set() if linear_weights else {f"{layer}.weight" for layer in linear_layers(block)}
        assign(block, self.block_names[index], self.checkpoint, self.device, self.dtype, skip=skip)

    def unload_block(self, index: int) -> None:
        """Free the weights of a block."""
        for module in self.blocks[index].modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @torch.no_grad()
    def embed(self, input_ids: Tensor, weight: Tensor | None = None) -> tuple[Tensor, BlockInputs]:
        """Hidden states [S, L, H] that the first block gets for ``input_ids`` [S, L], and the inputs of every block.

        The inputs are made for one sequence, so they serve any number of sequences of length L. ``weight`` [V, H] takes
        the place of that of the input embedding.
        """
        with replaced_weight(self.model.get_input_embeddings(), weight):
            return self._embed(input_ids)

    def _embed(self, input_ids: Tensor) -> tuple[Tensor, BlockInputs]:
        input_ids = input_ids.to(self.device)
        inputs = self.around.inputs(input_ids[:1])[1]
        # Row by row: in one batch, the model would make masks [S, 1, L, L] only for them to be thrown away.
        rows = [self.around.inputs(row[None], count=1)[0] for row in input_ids]
        return torch.cat(rows), inputs

    @torch.no_grad()
    def run_block(
        self,
        index: int,
        hidden: Tensor,
        inputs: BlockInputs,
        weights: Mapping[str, Tensor] | None = None,
        absent: Collection[str] = (),
    ) -> Tensor:
        """Hidden states [N, L, H] after block ``index``, given those before it and what `embed` made for length L.

        ``weights`` replaces weights of linear layers [rows, columns], keyed by the layer's name inside the block
        (`self_attn.q_proj`); they are used as they are, without a copy, and only for this call. Modules of the kinds in
        ``absent`` (`attn`, `mlp`) are not run, and add nothing to the residual stream; a block without any of its
        modules is gone, whatever norms it has.

        Raises:
            UnsupportedArchitectureError: a module of this architecture cannot be left out.
            ValueError: hidden states of another length, an unknown layer or a weight of another shape.
        """
        if hidden.shape[1] != inputs.length:
            raise ValueError(f"hidden states of length {hidden.shape[1]} with block inputs of length {inputs.length}")
        if self.gone(index, absent):
            return hidden
        replaced = self._replacements(index, weights or {})
        with left_out(self.blocks[index], [self._absence(index, kind) for kind in absent]):
            if inputs.alone:
                return torch.cat([self._run(index, row, inputs, replaced) for row in hidden.split(1)])
            return self._run(index, hidden, inputs, replaced)

    def _run(self, index: int, hidden: Tensor, inputs: BlockInputs, replaced: dict[str, Tensor]) -> Tensor:
        args, kwargs = inputs.call(index, hidden)
        output = torch.func.functional_call(self.blocks[index], replaced, args, kwargs, tie_weights=False)
        return output[0] if isinstance(output, tuple) else output

    def gone(self, index: int, absent: Collection[str]) -> bool:
        """Whether nothing of block ``index`` is left without the modules of kinds ``absent``."""
        return bool(absent) and set(absent) >= set(modules_of(linear_layers(self.blocks[index])))

    def _absence(self, index: int, kind: str) -> Absence:
        """How to run block ``index`` without a module; found once."""
        if (index, kind) not in self._absences:
            modules = modules_of(linear_layers(self.blocks[index]))
            if kind not in modules:
                raise ValueError(f"{self.block_names[index]}: has no {kind}; it has {sorted(modules)}")
            self._absences[index, kind] = find_absence(
                self.blocks[index],
                modules[kind],
                few_inputs(self.around),
                index,
                self.hidden_size,
                lambda reason: unsupported(self.model, reason),
            )
        return self._absences[index, kind]

    @torch.no_grad()
    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits [N, L, V] of final hidden states [N, L, H]; each position on its own, so L may be any chunk.

        ``weight`` [V, H] takes the place of that of the head, and of none else that is tied to it.
        """
        with replaced_weight(self.model.get_output_embeddings(), weight):
            return self.around.logits(hidden)

    @torch.no_grad()
    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What the head gets for final hidden states [N, L, H], [N, L, H]: they, after the last norm."""
        seen: list[Tensor] = []

        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            """Keep what the head is about to get, and go no further."""
            seen.append(args[0].reshape(hidden.shape))
            raise _HeadReached

        handle = self.model.get_output_embeddings().register_forward_pre_hook(observe)
        try:
            with suppress(_HeadReached):
                self.around.logits(hidden)
        finally:
            handle.remove()
        return seen[0]

    def _replacements(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layers = linear_layers(self.blocks[index]) if weights else {}
        for name, weight in weights.items():
            if name not in layers:
                raise ValueError(f"{self.block_names[index]}: has no linear layer {name!r}; it has {sorted(layers)}")
            if weight.shape != layers[name].weight.shape:
                expected = list(layers[name].weight.shape)
                raise ValueError(f"{self.block_names[index]}.{name}: weight {list(weight.shape)}, expected {expected}")
        return {f"{name}.weight": weight for name, weight in weights.items()}

    def _check_inputs(self) -> None:
        """Refuse blocks whose inputs beside the hidden states depend on the tokens: they could not be shared."""
        last = self.vocab_size - 1
        probes = [torch.tensor([ids], device=self.device) for ids in ([0, min(1, last), last], [last, 0, last // 2])]
        with torch.no_grad():
            first, second = (self.around.inputs(probe)[1] for probe in probes)
        if not first.same(second):
            raise unsupported(self.model, "its blocks get more than the hidden states that depends on the tokens")


@torch.inference_mode()
def final_hidden(
    model: BlockwiseModel, tokens: Tensor, run_tokens: int, description: str, check: Callable[[], None] = lambda: None
) -> Tensor:
    """Run ``tokens`` through all blocks, each loaded once and unloaded; hidden states wait in host memory.

    Args:
        model: opened with ``resident=False``, or its blocks are loaded again and then unloaded.
        tokens: [S, L] int64.
        run_tokens: tokens that pass a block at once; as many sequences as that holds, and at least one.
        description: what the progress bar says.
        check: called between runs; raises if the work should stop.

    Returns:
        [S, L, H] on the CPU, in the model's dtype: what the last block returns, before the final norm.
    """
    if not len(tokens):
        return torch.empty((*tokens.shape, model.hidden_size), dtype=model.dtype)
    rows = max(1, run_tokens // tokens.shape[1])
    inputs = model.embed(tokens[:1])[1]
    hidden = torch.cat([model.embed(batch)[0].cpu() for batch in tokens.split(rows)])
    with progress(description, len(model.blocks) * tokens.numel(), "block tokens") as bar:
        for block in range(len(model.blocks)):
            model.load_block(block)
            for piece in hidden.split(rows):
                check()
                piece.copy_(model.run_block(block, piece.to(model.device), inputs))
                bar.advance(piece.shape[0] * piece.shape[1])
            model.unload_block(block)
    return hidden
