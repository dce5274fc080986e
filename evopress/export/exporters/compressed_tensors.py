"""A folder in the format compressed-tensors, which vLLM and transformers run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evopress.compression.base import INTEGERS, Method
from evopress.compression.families import LayerFamily, RoundedSparsity
from evopress.compression.layers import LayerShape
from evopress.compression.methods.gptq import Gptq
from evopress.export.base import Exporter
from evopress.export.exporters.huggingface import SHARD_BYTES
from evopress.search.base import Strategy
from evopress.search.strategies.uniform import Uniform
from evopress.search.target import SizeTarget
from evopress.util.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.config.context import StageContext
    from evopress.export.pack_quantized import Scheme

KERNEL_BITS = ("4", "8")
"""Bit-widths of vLLM's kernels for weights of integers (Marlin, Machete); with zero points, only the first."""
GROUP_SIZES = (32, 64, 128, None)
"""Inputs that share a scale in these kernels; None is all of a channel."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM makes one matrix of. It knows others, such as Phi-3's `qkv_proj`, as one layer to begin with."""
_ROWS, _COLUMNS = 64, 128
"""What outputs and inputs of a layer are multiples of in Marlin, the kernel of most devices."""
_USAGE = {
    "vllm": """vLLM runs the folder with kernels for packed weights:

```sh
vllm serve {folder}
```

So does transformers, which unpacks the weights before it runs them (`pip install compressed-tensors`):

""",
    "transformers": """transformers unpacks the weights before it runs them (`pip install compressed-tensors`):

""",
}
_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


class CompressedTensors(Exporter):
    """A folder of packed integers in the format compressed-tensors, which vLLM and transformers run."""

    exporter: Literal["compressed_tensors"] = "compressed_tensors"
    runtime: Literal["vllm", "transformers"] = Field(
        "vllm",
        description="What shall run the folder. vLLM fuses q, k and v, and gate and up: they share a level; and its "
        "kernels have 4 and 8 bits (8 for `symmetric` variants only). `transformers` takes 2 to 8 bits in any layer.",
    )
    shard_bytes: int = Field(SHARD_BYTES, ge=1, description="Bytes of weights that a file holds at most.")

    def problems(self, where: str, method: Method, strategy: Strategy) -> Iterator[str]:
        """Levels that are no integers in groups, or in groups or at bit-widths that kernels do not have."""
        name = strategy.variants
        if isinstance(method.family, RoundedSparsity):
            yield (
                f"{where}: the integers of {name!r} are sparse, for which neither the library nor vLLM has a format "
                "any more (2:4 included); write an `archive`, or use `method: gptq`"
            )
            return
        if method.formats != INTEGERS:
            yield f"{where}: compressed_tensors holds integers with scales, which {name!r} are not; use `method: gptq`"
            return
        if isinstance(strategy.target, SizeTarget):
            yield f"{where}: the size of such a folder is not known before it is written; give an average as the target"
        if method.compresses_embedding:
            yield f"{where}: compressed_tensors keeps embedding and head dense; set `embedding: false` in {name!r}"
        if self.runtime == "vllm" and isinstance(method, Gptq) and method.group_size not in GROUP_SIZES:
            yield (
                f"{where}: vLLM's kernels have groups of 32, 64 or 128 inputs, or none (null), and {name!r} has "
                f"`group_size: {method.group_size}`; choose one of these, or set `runtime: transformers`"
            )
        if self.runtime == "transformers" and _mixes_zero_points(method, strategy):
            yield (
                f"{where}: transformers reads zero points only where all layers have one bit-width; set `symmetric: "
                f"true` in {name!r}"
            )
        if self.levels(method) == ():
            bits = "4 bits, and 8 without zero points (`symmetric: true`)"
            yield (
                f"{where}: of the bit-widths of {name!r} ({', '.join(method.labels())}), vLLM's kernels have none; "
                f"make variants at {bits}, or set `runtime: transformers`"
            )

    def unfit(
        self, where: str, method: Method, layers: Sequence[LayerShape], dtype: str | None, model_type: str | None
    ) -> Iterator[str]:
        """Scales that the type of the model does not hold, and layers that vLLM cannot fuse or compute."""
        if dtype == "bfloat16" and isinstance(method, Gptq) and method.scale_dtype == "float16":
            yield (
                f"{where}: the model is bfloat16, and its readers would round scales of float16; set `scale_dtype: "
                "bfloat16` in the variants"
            )
        if self.runtime == "vllm":
            yield from _unfused(where, method, layers)
            packed = (layer for layer in layers if not method.excludes(layer.name))
            uneven = [problem for one in packed if (problem := _uneven(one.name, one.rows, one.columns))]
            yield from (f"{where}: {problem}" for problem in uneven[:1])

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """What vLLM fuses."""
        return FUSED if self.runtime == "vllm" else ()

    def levels(self, method: Method) -> tuple[str, ...] | None:
        """What vLLM has kernels for."""
        if self.runtime != "vllm":
            return None
        symmetric = isinstance(method, Gptq) and method.symmetric
        return tuple(label for label in method.labels() if _has_kernel(label, symmetric))

    def write(self, context: "StageContext", search: str, folder: Path) -> None:
        """Write packed weights, the config that says how to read them, and everything else but the model card."""
        from evopress.export.compressed import CompressedModel
        from evopress.export.folder import copy_companions, write_tensors
        from evopress.export.pack_quantized import packed_bytes, packed_tensors, quantization_config, schemes_of
        from evopress.util.progress import progress

        model = CompressedModel(context, search)
        if model.dropped is not None:
            raise ArtifactError(f"{context.run.configuration(search)}: drops modules, which this format cannot say")
        dense = model.checkpoint.read(model.layout.names)
        schemes = schemes_of({name: model.format(name) for name in model.choices}, dense)
        stored = {unit: model.checkpoint.stored_name(f"{unit}.weight") for unit in model.configuration["unit"]}
        modules = {str(unit): schemes[name] for unit, name in stored.items() if name is not None}
        ignored = [name for name in _linear_modules(context) if name not in modules]
        self._check(modules, ignored, {str(unit): dense[name].shape for unit, name in stored.items() if name})
        sizes = {
            name: packed_bytes(schemes[name], tensor) if name in schemes else tensor.nbytes
            for name, tensor in dense.items()
        }
        with progress(f"export {search}", len(sizes), "tensors") as bar:

            def parts(name: str, tensor: "Tensor") -> "dict[str, Tensor]":
                """What the folder holds of a tensor: its packed parts, or the weight alone."""
                bar.advance()
                if name not in schemes:
                    return {name: model.weight(name, tensor)}
                return packed_tensors(name, *model.packed(name), tensor)

            copy_companions(context.run.model, folder)
            write_tensors(model.checkpoint, folder, sizes, parts, self.shard_bytes)
        _write_config(folder, quantization_config(modules, ignored))

    def _check(
        self, modules: "Mapping[str, Scheme]", ignored: Sequence[str], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Refuse what settings could not tell.

        Args:
            modules: how each compressed layer is packed.
            ignored: linear layers that stay dense.
            shapes: rows and columns of each compressed layer.

        Raises:
            ArtifactError: with a layer that is in the way.
        """
        if self.runtime == "vllm":
            for name, scheme in modules.items():
                if not _has_kernel(str(scheme.bits), scheme.symmetric) or scheme.group not in GROUP_SIZES:
                    raise ArtifactError(f"{name}: vLLM has no kernel for {scheme}; set `runtime: transformers`")
                if problem := _uneven(name, *shapes[name]):
                    raise ArtifactError(problem)
            _check_fused(modules, ignored)
        if len(set(modules.values())) > 1 and not all(scheme.symmetric for scheme in modules.values()):
            raise ArtifactError(
                "transformers reads zero points only where all layers have one bit-width, and this configuration has "
                "several; search over variants with `symmetric: true`"
            )

    def usage(self, folder: str) -> str:
        """With vLLM and transformers."""
        return (_USAGE[self.runtime] + _LOAD).format(folder=folder)

    def storage(self, family: LayerFamily) -> str:
        """As packed integers."""
        return (
            "Each compressed layer is stored as the packed integers and scales that the search judged, in the format "
            "`pack-quantized` of compressed-tensors; the rest is in the type of the original."
        )


def _has_kernel(bits: str, symmetric: bool) -> bool:
    """Whether vLLM runs layers of this bit-width packed."""
    return bits in (KERNEL_BITS if symmetric else KERNEL_BITS[:1])


def _mixes_zero_points(method: Method, strategy: Strategy) -> bool:
    """Whether a search may choose several bit-widths with zero points."""
    several = len(strategy.levels or method.labels()) > 1 and not isinstance(strategy, Uniform)
    return several and not (isinstance(method, Gptq) and method.symmetric)


def _linear_modules(context: "StageContext") -> list[str]:
    """Names of all linear layers of the model, the head among them."""
    from torch import nn

    from evopress.models.skeleton import built_on_meta, load_config

    trust = context.trust_remote_code
    model = built_on_meta(load_config(context.run.model, trust_remote_code=trust), trust_remote_code=trust)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _check_fused(modules: "Mapping[str, Scheme]", ignored: Sequence[str]) -> None:
    """Refuse layers that vLLM would fuse and that are not packed alike.

    Raises:
        ArtifactError: with two of them.
    """
    every: dict[str, Scheme | None] = {**modules, **dict.fromkeys(ignored)}
    for name, scheme in every.items():
        module, _, kind = name.rpartition(".")
        for fused in FUSED:
            for other in fused if kind in fused else ():
                if every.get(f"{module}.{other}", scheme) != scheme:
                    raise ArtifactError(
                        f"{name} and {module}.{other} are not at the same level, and vLLM makes one matrix of them; "
                        "run the search again with this export in its settings, or set `runtime: transformers`"
                    )


def _unfused(where: str, method: Method, layers: Sequence[LayerShape]) -> Iterator[str]:
    """The first of the layers that vLLM would fuse and of which some are excluded."""
    dense = {layer.name: method.excludes(layer.name) for layer in layers}
    for name, excluded in dense.items():
        module, _, kind = name.rpartition(".")
        for other in (f"{module}.{one}" for fused in FUSED if kind in fused for one in fused):
            if excluded and not dense.get(other, True):
                yield (
                    f"{where}: {name} is excluded and {other} is not, and vLLM makes one matrix of them; exclude both "
                    "or neither"
                )
                return


def _uneven(name: str, rows: int, columns: int) -> str | None:
    """What is wrong with the size of a layer for vLLM's kernel; None if nothing is."""
    if not rows % _ROWS and not columns % _COLUMNS:
        return None
    return (
        f"{name}: is {rows} x {columns}, and vLLM's kernel (Marlin) takes outputs in multiples of {_ROWS} and inputs "
        f"in multiples of {_COLUMNS}; exclude such layers, or set `runtime: transformers`"
    )


def _write_config(folder: Path, quantization: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": quantization}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
