"""A model folder without some modules: the config of fewer blocks, and checks that what is left is as it was."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evopress.compression.dropped import Dropped
from evopress.models.blockwise import BlockwiseModel
from evopress.models.checkpoint import Checkpoint, read_json
from evopress.models.skeleton import fill_outside, load_config, skeleton_of
from evopress.models.structure import find_blocks, surroundings_of
from evopress.models.trace import BlockInputs
from evopress.util.errors import UnsupportedArchitectureError

_OF_THE_WHOLE_MODEL = ("_token_id", "_token_ids", "architectures")
"""How names of lists end that are never one entry a layer, however long they are."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
_NARROW = 2
"""A window so small that a few tokens tell which blocks have one."""
_TOKENS = 6


def write_cut_config(source: Path, folder: Path, kept: Sequence[int], *, trust_remote_code: bool = False) -> None:
    """Write config.json of the model in ``source``, with the blocks ``kept`` alone, into ``folder``.

    Lists with an entry for each layer are cut; lists that transformers derives from a rule by index (Qwen2's
    `max_window_layers`, Gemma's `sliding_window_pattern`) are written out, since the rule would count anew.

    Raises:
        ModelError: config.json is missing or damaged.
        UnsupportedArchitectureError: transformers does not know the architecture.
    """
    raw = read_json(source / "config.json")
    config = load_config(source, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    section = _section(raw, config, text)
    for name, value in _per_layer(text):
        section[name] = [value[block] for block in kept]
    section[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if "num_hidden_layers" in section:  # beside a name of the architecture's own, as in GPT-J's `n_layer`
        section["num_hidden_layers"] = len(kept)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def check_cut_config(source: Path, folder: Path, kept: Sequence[int], *, trust_remote_code: bool = False) -> None:
    """Check that the config in ``folder`` makes each block what it is in ``source``: its settings and its inputs.

    Raises:
        UnsupportedArchitectureError: a block would change by its new number; the message tells what.
    """
    checkpoint = Checkpoint(source)
    whole = _seen(source, checkpoint, trust_remote_code)
    cut = _seen(folder, checkpoint, trust_remote_code)
    if len(cut) != len(kept):
        raise UnsupportedArchitectureError(f"{folder}: config.json gives {len(cut)} blocks, not {len(kept)}")
    for number, block in enumerate(kept):
        differs = _difference(whole[block], cut[number], (block, number))
        if differs:
            raise UnsupportedArchitectureError(
                f"{source}: block {block} would not be the same as block {number} of a shorter model: its {differs} "
                "follows from its number by a rule that config.json cannot state otherwise; keep one module of every "
                "block, by `exclude`"
            )


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


def _section(raw: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The part of config.json that the text model's config was read from."""
    if text is config:
        return raw
    for key, value in raw.items():
        if isinstance(value, dict) and getattr(config, key, None) is text:
            return value
    raise UnsupportedArchitectureError(f"{type(config).__name__}: config.json has no section of the text model to cut")


def _per_layer(text: Any) -> Iterator[tuple[str, list[Any]]]:
    """Lists of a config that have an entry for each layer."""
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers and not name.endswith(_OF_THE_WHOLE_MODEL):
            yield name, value


def _seen(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> list[dict[str, Any]]:
    """What can be seen of each block without its weights: settings of its modules, and its inputs beside the tokens."""
    config = load_config(folder, trust_remote_code=trust_remote_code)
    for name in _WINDOWS:
        if getattr(config.get_text_config(), name, None):
            setattr(config.get_text_config(), name, _NARROW)
    model = skeleton_of(config, checkpoint.floating_dtype(), trust_remote_code=trust_remote_code)
    fill_outside(model, find_blocks(model)[0], checkpoint, torch.device("cpu"))
    around = surroundings_of(model)[1]
    with torch.no_grad():
        inputs = around.inputs(torch.zeros((1, _TOKENS), dtype=torch.long))[1]
    return [
        {**_settings(block), "inputs": BlockInputs(inputs.length, (args,), (kwargs,), inputs.by_name, inputs.alone)}
        for block, args, kwargs in zip(around.blocks, inputs.args, inputs.kwargs, strict=True)
    ]


def _settings(block: nn.Module) -> dict[str, Any]:
    """Classes, shapes, buffers and plain attributes of all modules of a block, by their names inside it."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        own = {key: value for key, value in vars(module).items() if _is_plain(value)}
        shapes = {key: list(tensor.shape) for key, tensor in module.named_parameters(recurse=False)}
        facts = {"class": type(module).__name__, **own, **shapes, **dict(module.named_buffers(recurse=False))}
        found |= {f"{path}.{key}".lstrip("."): value for key, value in facts.items()}
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], numbers: tuple[int, int]) -> str:
    """The first thing in which two blocks differ, save that each knows its own number; empty if there is none."""
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if not _same(before, after) and (type(before) is not int or (before, after) != numbers):
            return name
    return ""


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, BlockInputs) and isinstance(after, BlockInputs):
        return before.same(after)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    return type(before) is type(after) and bool(before == after)
