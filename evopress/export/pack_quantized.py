"""The format `pack-quantized` of compressed-tensors: integers in 32-bit words, with scales and zero points.

Integers, scales and zero points are those that a search judged: nothing is quantized again. A weight is
(code - zero) x scale. Readers hold scales in the type of the model and round the product to it; so did the search, and
the difference of two codes of at most 8 bits is exact in every type. So the weights are the same to the bit, provided
that the model's type holds the scales, which is checked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evopress.compression.formats.integer import IntegerFormat
from evopress.util.errors import ArtifactError

_ROWS_AT_ONCE = 256
_WORD_BITS = 32


class Scheme(NamedTuple):
    """How a layer is packed."""

    bits: int
    symmetric: bool
    group: int | None
    """Inputs that share a scale; None is all of a channel."""

    def __str__(self) -> str:
        zeros = "without" if self.symmetric else "with"
        return f"{self.bits} bits in groups of {self.group or 'a channel'} {zeros} zero points"


def quantization_config(modules: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says of quantization: a group of layers for each way of packing.

    Args:
        modules: how each compressed layer is packed, by the name of its module.
        ignored: modules of linear layers that stay dense.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in modules.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group else "channel",
                "group_size": scheme.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, (scheme, names) in enumerate(sorted(by_scheme.items(), key=lambda item: item[0].bits))
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    # transformers does not load packed zero points as they are (it expects one byte each), but unpacks them on loading.
    return quantization if all(scheme.symmetric for scheme in by_scheme) else {**quantization, "dequantize": True}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of ``codes`` (uint8 [rows, n], below 2^bits) into int32 words, from the lowest bit on.

    No bit is wasted: where the bits do not divide 32, a code may lie in two words.

    Returns:
        [rows, words]; the last word of a row is filled with zeros.
    """
    rows, count = codes.shape
    words = -(-count * bits // _WORD_BITS)
    packed = np.zeros((rows, words * _WORD_BITS // 8), dtype=np.uint8)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = codes[start : start + _ROWS_AT_ONCE].cpu().numpy()
        single = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little").reshape(len(part), -1)
        filled = np.packbits(single, axis=-1, bitorder="little")
        packed[start : start + len(part), : filled.shape[1]] = filled
    return torch.from_numpy(packed.view("<i4"))


def schemes_of(formats: Mapping[str, str], dense: Mapping[str, Tensor]) -> dict[str, Scheme]:
    """How each variant is packed, by the name of the tensor whose place it takes.

    Args:
        formats: of the variants, as tables name them.
        dense: weights [rows, columns] of these names.

    Raises:
        ArtifactError: one is no integers in groups.
    """
    forms: dict[str, IntegerFormat] = {}
    for name, text in formats.items():
        form = IntegerFormat.parse(text)
        if form is None:
            raise ArtifactError(
                f"{name}: is stored as {text}, and compressed-tensors holds integers with scales; search over variants "
                "of `method: gptq`"
            )
        forms[name] = form
    # A group may be as wide as some layers by chance: layers of one setting shall be of one scheme.
    by_channel = all(form.group == dense[name].shape[1] for name, form in forms.items())
    return {name: Scheme(form.bits, form.symmetric, None if by_channel else form.group) for name, form in forms.items()}


def packed_bytes(scheme: Scheme, dense: Tensor) -> int:
    """Size of what `packed_tensors` makes."""
    rows, columns = dense.shape
    groups = columns // scheme.group if scheme.group else 1
    codes = rows * -(-columns * scheme.bits // _WORD_BITS)
    zeros = 0 if scheme.symmetric else -(-rows * scheme.bits // _WORD_BITS) * groups
    return 4 * (codes + zeros) + rows * groups * dense.itemsize + 2 * 8


def packed_tensors(name: str, text: str, parts: Mapping[str, Tensor], dense: Tensor) -> dict[str, Tensor]:
    """Tensors that take the place of a weight, by the names under which they are stored.

    Args:
        name: under which the dense weight is stored, as in `model.layers.0.self_attn.q_proj.weight`.
        text: format of its variant.
        parts: of the variant.
        dense: the weight [rows, columns], of whose values only shape and type matter.

    Raises:
        ArtifactError: the variant is damaged or of another shape, or has scales that the model's type does not hold.
    """
    form = IntegerFormat.parse(text)
    assert form is not None
    rows, columns = dense.shape
    codes, scales, zeros = form.unpacked(parts, (rows, columns))
    held = scales.to(dense.dtype)
    if not torch.equal(held.float(), scales.float()):
        kind = str(dense.dtype).removeprefix("torch.")
        raise ArtifactError(
            f"{name}: its scales ({str(scales.dtype).removeprefix('torch.')}) are not exact in {kind}, the type of the "
            f"model, in which they would be read; set `scale_dtype: {'float16' if kind == 'float16' else 'bfloat16'}` "
            "in the variants"
        )
    packed = {
        f"{name}_packed": pack_words(codes, form.bits),
        f"{name}_scale": held,
        f"{name}_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if zeros is not None:
        packed[f"{name}_zero_point"] = pack_words(zeros.t().contiguous(), form.bits).t().contiguous()
    return packed
