"""Rounding to the nearest of what a GGUF type can hold, by the library `libgguf`: the quantizers of llama.cpp."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

from evopress.compression.formats.gguf import GgufFormat
from evopress.compression.gguf_gptq import GgufQuantized
from evopress.compression.gguf_types import GgufType
from evopress.util.errors import CompressionError

_LEAST_IMPORTANCE = 1e-6
"""Of the mean: a block of inputs that are all dead still gets a scale."""


def gguf_rtn(weight: Tensor, hessian: Tensor, kinds: Sequence[GgufType]) -> list[GgufQuantized]:
    """Round a linear layer to several types, where inputs count as much as their Hessian diagonal.

    Args:
        weight: finite weights [rows, columns].
        hessian: X^T X of the layer's inputs, [columns, columns].
        kinds: types whose blocks divide the columns.

    Raises:
        CompressionError: libgguf is not installed.
    """
    importance = hessian.diagonal() / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    importance = importance.clamp(min=_LEAST_IMPORTANCE)
    results = []
    for kind in kinds:
        blocks = round_to_nearest(weight, importance, kind).to(weight.device)
        rounded = GgufFormat(kind).decode({"blocks": blocks}, (weight.shape[0], weight.shape[1]), torch.float32)
        deviation = rounded.sub_(weight)
        errors = torch.einsum("rc,rc->r", deviation @ hessian.float(), deviation).double()
        results.append(GgufQuantized(blocks, errors, damping=0.0))
    return results


def round_to_nearest(weight: Tensor, importance: Tensor, kind: GgufType) -> Tensor:
    """Blocks (uint8 [rows, bytes of a row], on the CPU) of a weight [rows, columns] with these importances [columns].

    Raises:
        CompressionError: libgguf is not installed.
    """
    if find_spec("libgguf") is None:
        raise CompressionError(
            "rounding to the nearest GGUF type needs libgguf: pip install 'evopress[gguf]', or choose `rounding: gptq`"
        )
    import libgguf

    number, counts = libgguf.GGMLQuantizationType[kind.name], importance.float().cpu().numpy()

    def rounded(rows: Tensor) -> Tensor:
        """Blocks of some rows [n, columns]."""
        return torch.from_numpy(libgguf.quantize_rows(rows.numpy(), number, counts))

    rows = weight.float().cpu()
    rounded(rows[:1])  # makes the tables of types with codebooks, once, before several threads read them
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # rows do not depend on each other, and libgguf leaves Python alone
        return torch.cat(list(pool.map(rounded, rows.split(-(-len(rows) // threads)))))
