"""A look at the stitched folder before it counts as done: dropped modules add nothing, as in the search."""

from pathlib import Path

import torch

from evopress.compression.dropped import Dropped
from evopress.models.blockwise import BlockwiseModel
from evopress.util.errors import UnsupportedArchitectureError

_TOKENS = 4


def check_single_modules(folder: Path, dropped: Dropped, *, trust_remote_code: bool = False) -> None:
    """Run each block that lost one module as it is stored, and without that module: both must give the same.

    Raises:
        ModelError: the folder cannot be loaded.
        UnsupportedArchitectureError: something after the module makes other numbers of its zeros.
    """
    if not dropped.single:
        return
    model = BlockwiseModel.from_folder(folder, torch.device("cpu"), resident=False, trust_remote_code=trust_remote_code)
    hidden, inputs = model.embed(torch.arange(_TOKENS)[None] % model.vocab_size)
    for block, kind in dropped.single:
        number = dropped.kept.index(block)
        model.load_block(number)
        stored = model.run_block(number, hidden, inputs)
        if not torch.equal(stored, model.run_block(number, hidden, inputs, absent={kind})):
            raise UnsupportedArchitectureError(
                f"{type(model.model).__name__}: {kind} of block {block} still adds to the hidden states with an output "
                "projection of zeros; drop whole blocks (unit: block), or exclude it"
            )
        model.unload_block(number)
