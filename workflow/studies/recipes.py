"""Which type each tensor of a dense model gets where llama.cpp's quantizer is asked for a mixture, as in Q3_K_M.

Written after `llama_tensor_get_type_impl` and `tensor_type_fallback` (llama.cpp, src/llama-quant.cpp, 2026), for models
without experts that are quantized with an importance matrix. A fork's own mixtures differ: it is told these types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

BASES = {
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "Q2_K": "Q2_K",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_S": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
    "Q4_0": "Q4_0",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
}
"""Mixtures that can be asked for, with the type of most tensors."""
_SMALL = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
"""Of about two bits, which share their rules."""
FALLBACKS = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}
"""What a tensor gets instead whose rows are no multiple of 256. For Q2_K and Q3_K, llama.cpp took IQ4_NL until 2026 and
takes Q4_0 since: of the same size, but a worse peer."""
UNCHANGED = "F16"
"""Type of tensors whose rows no type divides."""


@dataclass(frozen=True)
class Sizes:
    """What the rules ask of a model."""

    blocks: int
    queries_per_key: int
    """Heads of queries that share keys and values."""


def tensor_types(mixture: str, columns: Mapping[str, int], sizes: Sizes) -> dict[str, str]:
    """Type of each weight matrix.

    Args:
        mixture: one of ``BASES``.
        columns: length of the rows, by the names of the matrices in a GGUF file.
        sizes: of the model.
    """
    tied = "output.weight" not in columns
    return {name: _fitting(_wanted(mixture, name, count, sizes, tied), count) for name, count in columns.items()}


def _wanted(mixture: str, name: str, columns: int, sizes: Sizes, tied: bool) -> str:
    base, parts = BASES[mixture], name.split(".")
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return _head(mixture, base, columns)
    if name == "token_embd.weight":
        return _embedding(mixture, base)
    rule = _RULES.get(parts[2]) if parts[0] == "blk" else None
    return rule(mixture, base, int(parts[1]), sizes) if rule else base


def _fitting(kind: str, columns: int) -> str:
    """The type itself where its blocks fill the rows, or what is taken instead."""
    if kind in FALLBACKS and columns % 256:
        kind = FALLBACKS[kind]
    return UNCHANGED if columns % 32 else kind


def _head(mixture: str, base: str, columns: int) -> str:
    if columns % (256 if base in FALLBACKS else 32):
        return "Q8_0"
    if mixture in (*_SMALL, "IQ3_XXS"):
        return "Q5_K"
    return "Q8_0" if base == "Q8_0" else "Q6_K"


def _embedding(mixture: str, base: str) -> str:
    if mixture in ("IQ2_XXS", "IQ2_XS"):
        return "Q2_K"
    return "IQ3_S" if mixture in ("IQ2_S", "IQ2_M", "IQ3_XXS") else base


def _more_bits(block: int, blocks: int) -> bool:
    """Blocks at both ends, and every third between them."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def _values(mixture: str, base: str, block: int, sizes: Sizes) -> str:
    shared = sizes.queries_per_key >= 4
    if mixture in _SMALL:
        return "Q4_K" if shared else "IQ3_S" if mixture in ("IQ2_S", "IQ2_M") else "Q2_K"
    if shared and mixture in ("Q2_K", "IQ3_XXS", "IQ3_S"):
        return "Q4_K"
    if shared and mixture in ("IQ4_XS", "IQ4_NL"):
        return "Q5_K"
    if mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(block, sizes.blocks):
        return "Q6_K"
    own = {
        "Q2_K": "Q3_K",
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if block < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if block < 4 else base,
    }
    return own.get(mixture, base)


def _queries_and_keys(mixture: str, base: str, block: int, sizes: Sizes) -> str:
    return "IQ2_S" if mixture == "IQ3_XXS" else base


def _fused_attention(mixture: str, base: str, block: int, sizes: Sizes) -> str:
    if mixture in _SMALL:
        return _values(mixture, base, block, sizes)
    return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(mixture, base)


def _attention_output(mixture: str, base: str, block: int, sizes: Sizes) -> str:
    own = {"IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "IQ3_M": "Q4_K"}
    return {**own, "Q3_K_L": "Q5_K"}.get(mixture, base)


def _down(mixture: str, base: str, block: int, sizes: Sizes) -> str:
    first = block < sizes.blocks // 8
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(block, sizes.blocks) else base
    if mixture == "Q3_K_M":
        return "Q5_K" if block < sizes.blocks // 16 else "Q4_K"
    if first and mixture in _SMALL:
        return "IQ3_S" if mixture in ("IQ2_S", "IQ2_M") else "Q2_K"
    if first and mixture in ("IQ3_M", "Q4_K_S", "Q4_0"):
        return {"IQ3_M": "Q4_K", "Q4_K_S": "Q5_K", "Q4_0": "Q4_1"}[mixture]
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mixture, base)


_RULES: Mapping[str, Callable[[str, str, int, Sizes], str]] = {
    "attn_v": _values,
    "attn_q": _queries_and_keys,
    "attn_k": _queries_and_keys,
    "attn_qkv": _fused_attention,
    "attn_output": _attention_output,
    "ffn_down": _down,
}
