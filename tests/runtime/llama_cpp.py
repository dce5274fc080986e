"""llama.cpp itself, through the C API that the library of the wheel `xllamacpp` exports.

A process of its own, which runs this file, loads it: so a crash there fails one test and not all, and its threads never
meet those of torch. It is told what to do as JSON and answers with a NumPy file.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_THREADS = 1
_TIMEOUT = 600


@dataclass(frozen=True)
class Run:
    """What llama.cpp made of a file."""

    logits: NDArray[np.float32]
    """[tokens, vocabulary], of every position."""
    tokens: list[list[int]]
    """Of each text."""
    seconds: float
    """For the logits."""


def is_installed() -> bool:
    """Whether the wheel is there."""
    return find_spec("xllamacpp") is not None


def run(path: Path, tokens: Sequence[int] = (), texts: Sequence[str] = ()) -> Run:
    """Load a GGUF file, and compute the logits of ``tokens`` in one batch, and the tokens of ``texts``.

    Raises:
        RuntimeError: llama.cpp refused the file or ended; its log is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.npz"
        asked = {"path": str(path), "tokens": list(tokens), "texts": list(texts), "answer": str(answer)}
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode:
            raise RuntimeError(f"llama.cpp ended with {done.returncode} on {path}:\n{done.stderr[-3000:]}")
        with np.load(answer) as held:
            return Run(held["logits"], json.loads(str(held["tokens"])), float(held["seconds"]))


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
    library = ctypes.CDLL(_library_path())
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    signatures = {
        "llama_backend_init": (None, []),
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [text, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_set_n_threads": (None, [pointer, number, number]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_tokenize": (number, [pointer, text, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
        "llama_batch_init": (_Batch, [number, number, number]),
        "llama_decode": (number, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _library_path() -> str:
    spec = find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is not installed: pip install 'evopress[runtime]'")
    return spec.origin


def _tokenize(library: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (len(raw) + 8))()
    count = library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
    if count < 0:
        raise RuntimeError(f"{text!r}: more tokens than bytes")
    return list(room[:count])


def _logits(library: Any, model: Any, tokens: Sequence[int], size: int) -> NDArray[np.float32]:
    count = len(tokens)
    parameters = library.llama_context_default_params()
    for field in range(3):  # n_ctx, n_batch, n_ubatch: all in one piece
        parameters.words[field] = count
    context = library.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError("llama.cpp made no context")
    library.llama_set_n_threads(context, _THREADS, _THREADS)
    batch = library.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if status := library.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode gave {status}")
    return np.ctypeslib.as_array(library.llama_get_logits(context), (count, size)).copy()


def _main() -> None:
    asked = json.load(sys.stdin)
    library = _library()
    library.llama_backend_init()
    model = library.llama_model_load_from_file(asked["path"].encode(), library.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp did not load the file")
    vocabulary = library.llama_model_get_vocab(model)
    size = library.llama_vocab_n_tokens(vocabulary)
    tokens = [_tokenize(library, vocabulary, text) for text in asked["texts"]]
    begin = time.perf_counter()
    logits = _logits(library, model, asked["tokens"], size) if asked["tokens"] else np.zeros((0, size), np.float32)
    seconds = time.perf_counter() - begin
    np.savez(asked["answer"], logits=logits, tokens=json.dumps(tokens), seconds=seconds)


if __name__ == "__main__":
    _main()
