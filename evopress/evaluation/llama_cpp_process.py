"""The process in which llama.cpp runs, through the C API that the library of the wheel `xllamacpp` exports.

It is told what to do as JSON on its standard input. It answers on its standard output with lines of JSON; float32
numbers follow a line that has a shape.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

AT_ONCE = 512
"""Tokens that pass the model at once, as llama.cpp has it by default."""


class Speed(NamedTuple):
    """What one repetition took, in seconds."""

    prompt: float
    """For all tokens of the prompt."""
    generation: float
    """For all tokens after it, one after the other."""


class _Parameters(ctypes.Structure):
    """Room for a structure of parameters of any version: it is passed in memory, so more than its size does no harm."""

    _fields_ = (("words", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def _library() -> Any:
    """The library, with the types of the functions in use (llama.cpp, include/llama.h)."""
    spec = find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is not installed")
    library = ctypes.CDLL(spec.origin)
    pointer, text, number, flag = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
    signatures = {
        "llama_backend_init": (None, []),
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [text, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_set_n_threads": (None, [pointer, number, number]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_tokenize": (number, [pointer, text, number, pointer, number, flag, flag]),
        "llama_batch_init": (_Batch, [number, number, number]),
        "llama_batch_get_one": (_Batch, [ctypes.POINTER(number), number]),
        "llama_decode": (number, [pointer, _Batch]),
        "llama_synchronize": (None, [pointer]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, flag]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


class _Model:
    """A file that the library has loaded."""

    def __init__(self, library: Any, path: str, threads: int) -> None:
        self.library, self.path, self.threads = library, path, threads
        self.pointer = library.llama_model_load_from_file(os.fsencode(path), library.llama_model_default_params())
        if not self.pointer:
            raise RuntimeError(f"{path}: was not loaded")

    @cached_property
    def vocabulary(self) -> Any:
        """What the library knows the tokens of the model by."""
        return self.library.llama_model_get_vocab(self.pointer)

    @cached_property
    def size(self) -> int:
        """Logits per token."""
        return int(self.library.llama_vocab_n_tokens(self.vocabulary))

    def context(self, tokens: int, batch: int) -> "_Context":
        """Room for so many tokens, of which ``batch`` may be decoded in one call."""
        parameters = self.library.llama_context_default_params()
        parameters.words[0:3] = tokens, batch, min(batch, AT_ONCE)  # n_ctx, n_batch, n_ubatch
        pointer = self.library.llama_init_from_model(self.pointer, parameters)
        if not pointer:
            raise RuntimeError(f"{self.path}: no context of {tokens} tokens was made")
        self.library.llama_set_n_threads(pointer, self.threads, self.threads)
        return _Context(self, pointer)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, with those that the file asks to be added, and special ones parsed."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)
        if count < 0:
            raise RuntimeError(f"{text!r}: more tokens than bytes")
        return list(room[:count])


class _Context(NamedTuple):
    """A cache of keys and values, and buffers to compute in."""

    model: _Model
    pointer: Any

    def clear(self) -> None:
        """Empty the cache."""
        library = self.model.library
        library.llama_memory_clear(library.llama_get_memory(self.pointer), True)

    def extend(self, tokens: Sequence[int]) -> None:
        """Decode more tokens, for the logits of the last of them, as a program that generates text does."""
        room = (ctypes.c_int32 * len(tokens))(*tokens)
        self._decode(self.model.library.llama_batch_get_one(room, len(tokens)))
        self.model.library.llama_synchronize(self.pointer)

    def logits(self, tokens: Sequence[int], start: int, batch: _Batch) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary] of tokens that stand at ``start`` and after it."""
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, start + place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        self._decode(batch)
        found = self.model.library.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(found, (len(tokens), self.model.size))

    def _decode(self, batch: _Batch) -> None:
        if status := self.model.library.llama_decode(self.pointer, batch):
            raise RuntimeError(f"{self.model.path}: llama_decode gave {status}")


def _serve(order: dict[str, Any], answers: IO[bytes]) -> None:
    """Do what is asked, and write the answers."""
    library, paths, threads = _library(), order["paths"], order["threads"]
    if order["action"] == "memory":
        made: Iterator[Any] = iter([_memory(library, paths[0], threads, order["tokens"], order["generated"])])
    else:
        models = [_Model(library, path, threads) for path in paths]
        if order["action"] == "logits":
            made = _logits(models[0], order["sequences"])
        elif order["action"] == "speeds":
            made = _speeds(models, order["tokens"], order["generated"], order["repetitions"])
        else:
            made = map(models[0].tokenize, order["texts"])
    for answer in made:
        numbers = isinstance(answer, np.ndarray)
        answers.write(json.dumps({"shape": answer.shape} if numbers else answer).encode() + b"\n")
        if numbers:
            answers.write(answer.data.cast("B"))
        answers.flush()


def _logits(model: _Model, sequences: list[list[int]]) -> Iterator[NDArray[np.float32]]:
    longest = max(map(len, sequences), default=1)
    at_once = min(longest, AT_ONCE)
    context, batch = model.context(longest, at_once), model.library.llama_batch_init(at_once, 0, 1)
    for sequence in sequences:
        context.clear()
        for start in range(0, len(sequence), at_once):
            yield context.logits(sequence[start : start + at_once], start, batch)


def _memory(library: Any, path: str, threads: int, tokens: list[int], generated: int) -> int:
    before = psutil.Process().memory_info().rss
    context = _Model(library, path, threads).context(len(tokens) + generated, len(tokens))
    _generate(context, tokens, generated)
    return psutil.Process().memory_info().rss + _untouched(path) - before


def _untouched(path: str) -> int:
    """Bytes that are mapped from a file and not in memory yet."""
    process = psutil.Process()
    if not hasattr(process, "memory_maps"):
        return 0
    maps = (one for one in process.memory_maps(grouped=False) if Path(one.path) == Path(path).resolve())
    return sum(one.size - one.rss for one in maps)


def _speeds(models: list[_Model], tokens: list[int], generated: int, repetitions: int) -> Iterator[list[Speed]]:
    contexts = [model.context(len(tokens) + generated, len(tokens)) for model in models]
    for repetition in range(repetitions + 1):
        taken = [_generate(context, tokens, generated) for context in contexts]
        if repetition:
            yield taken


def _generate(context: _Context, tokens: list[int], generated: int) -> Speed:
    """Decode a prompt, and then as many tokens one by one; which they are makes no difference to the time."""
    context.clear()
    start = time.perf_counter()
    context.extend(tokens)
    between = time.perf_counter()
    for number in range(generated):
        context.extend([tokens[number % len(tokens)]])
    return Speed(between - start, time.perf_counter() - between)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints is no answer
    _serve(json.load(sys.stdin), own)
