"""llama.cpp, the runtime of GGUF files: logits, tokens, memory and speed of a file.

A process of its own (`llama_cpp_process`) loads the library: so a crash there ends with a message and not with the job,
its threads never meet those of torch, and its memory is that of the runtime.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from evopress.evaluation import llama_cpp_process
from evopress.evaluation.llama_cpp_process import AT_ONCE, Speed
from evopress.util.errors import ConfigError, ModelError

__all__ = ["AT_ONCE", "Speed", "is_installed", "logits", "resident_bytes", "runtime_version", "speeds", "tokenize"]
NOT_INSTALLED = (
    "llama.cpp is not installed; run `pip install -e '.[runtime]'`, or leave `evaluation.runtime` out of the settings"
)
_LAST_WORDS = 20
"""Lines of the library's log that an error repeats."""


def is_installed() -> bool:
    """Whether the wheel is there."""
    return find_spec("xllamacpp") is not None


def runtime_version() -> str:
    """Name and number of what runs the files."""
    return f"llama.cpp (xllamacpp {version('xllamacpp')})"


def logits(path: Path, sequences: Iterable[Sequence[int]], threads: int) -> Iterator[NDArray[np.float32]]:
    """Logits of every position of every sequence, in their order: pieces [tokens, vocabulary] of AT_ONCE at most.

    Each sequence starts with an empty cache.

    Raises:
        ConfigError: the library is not installed.
        ModelError: it refused the file or ended.
    """
    asked = [list(map(int, sequence)) for sequence in sequences]
    yield from _answers("logits", [path], threads, sequences=asked)


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text, with those that the file asks to be added, and special ones parsed.

    Raises:
        ConfigError, ModelError: as `logits`.
    """
    return list(_answers("tokenize", [path], 1, texts=list(texts)))


def resident_bytes(path: Path, tokens: Sequence[int], generated: int, threads: int) -> int:
    """Memory that a fresh process takes to load a file, decode ``tokens`` as a prompt, and then ``generated`` more.

    It is the growth of the resident set over the process with the library loaded and no model: weights, cache and
    buffers. Weights that are mapped from the file are counted whole, whether or not their pages have been touched
    (where the system tells what is mapped: Linux). Types that llama.cpp rearranges for the CPU, such as Q4_0, count
    twice, as it keeps what it has mapped beside the copy.

    Raises:
        ConfigError, ModelError: as `logits`.
    """
    (taken,) = _answers("memory", [path], threads, tokens=list(map(int, tokens)), generated=generated)
    return int(taken)


def speeds(
    paths: Sequence[Path], tokens: Sequence[int], generated: int, repetitions: int, threads: int
) -> Iterator[list[Speed]]:
    """Time of a prompt and of the tokens after it, for each repetition, of each file.

    All files are loaded in one process and take turns, so that what else the machine does meets all of them. A round
    before the first is not counted.

    Raises:
        ConfigError, ModelError: as `logits`.
    """
    asked = {"tokens": list(map(int, tokens)), "generated": generated, "repetitions": repetitions}
    for taken in _answers("speeds", paths, threads, **asked):
        yield [Speed(*one) for one in taken]


def _answers(action: str, paths: Sequence[Path], threads: int, **asked: Any) -> Iterator[Any]:
    """Start the process, and yield its answers as they come."""
    if not is_installed():
        raise ConfigError(f"evaluation.runtime: {NOT_INSTALLED}")
    order = {"action": action, "paths": list(map(str, paths)), "threads": threads, **asked}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
        told.write(json.dumps(order).encode())
        told.seek(0)
        command = [sys.executable, "-m", llama_cpp_process.__name__]
        process = subprocess.Popen(command, stdin=told, stdout=subprocess.PIPE, stderr=said, env=environment)
        try:
            assert process.stdout is not None
            yield from _read(process.stdout)
        except BaseException:  # nobody will read the rest
            process.kill()
            raise
        finally:
            process.communicate()
        if process.returncode:
            raise ModelError(f"{' and '.join(order['paths'])}: llama.cpp {_end(process.returncode)}{_last_words(said)}")


def _read(answers: IO[bytes]) -> Iterator[Any]:
    while line := answers.readline():
        answer = json.loads(line)
        if not isinstance(answer, dict):
            yield answer
            continue
        shape = answer["shape"]
        numbers = bytearray(4 * math.prod(shape))
        if answers.readinto(numbers) < len(numbers):  # type: ignore[attr-defined]
            return  # the process has ended; its exit code tells
        yield np.frombuffer(numbers, np.float32).reshape(shape)


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_words(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()[-_LAST_WORDS:]
    return "".join(f"\n    {line}" for line in lines)
