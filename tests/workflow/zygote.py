"""Starts the workflow's scripts by forking, so that a start costs no imports and hundreds of jobs can be killed.

A process of its own (`python zygote.py`) imports what scripts need, then reads orders from its standard input, one JSON
object a line, and answers each with one. A forked job can be told to kill itself with SIGKILL just before its n-th
change of a file below a folder: every open for writing, fsync, rename, removal and change of mode counts as one.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.symlink", "os.truncate")


@dataclass
class Ended:
    """How a job has ended."""

    code: int
    """Exit code, or minus the number of the signal that killed it."""
    output: str
    """What it wrote to standard output and error."""
    changes: int
    """Changes of files; counted only if the job was not killed."""
    seconds: float


@dataclass
class Zygote:
    """The client's end."""

    cache: Path
    """What stands for the user's cache of the hub."""
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.cache)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(
        self,
        command: list[str],
        root: Path,
        *,
        strike: int = 0,
        environment: dict[str, str | None] | None = None,
        user: int = 0,
    ) -> int:
        """Fork a job that runs a script in ``root``; returns its process id.

        Args:
            command: script and arguments.
            root: working directory.
            strike: number of the change of a file below ``root``/results that kills the job; 0 is none.
            environment: variables to set, or to unset where None.
            user: id of the user to become; 0 is none.
        """
        order = {"command": command, "root": str(root), "strike": strike, "environment": environment or {}}
        return self._ask({**order, "user": user})["process"]

    def wait(self, process: int) -> Ended:
        """Wait for the end of a job."""
        return Ended(**self._ask({"wait": process}))

    def run(self, command: list[str], root: Path, **options: Any) -> Ended:
        """Start a job and wait for its end."""
        return self.wait(self.start(command, root, **options))

    def close(self) -> None:
        """End the zygote."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """Fork jobs as they are ordered, until standard input ends."""
    import time

    _preload()
    running: dict[int, tuple[float, int, int]] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            started, output, count = running.pop(order["wait"])
            status = os.waitpid(order["wait"], 0)[1]
            answer: dict[str, Any] = {
                "code": os.waitstatus_to_exitcode(status),
                "output": _drain(output).decode(errors="replace"),
                "changes": int(_drain(count) or 0),
                "seconds": time.monotonic() - started,
            }
        else:
            output, count = os.memfd_create("output"), os.memfd_create("changes")
            process = os.fork()
            if not process:
                _be_job(order, output, count)
            running[process] = time.monotonic(), output, count
            answer = {"process": process}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _preload() -> None:
    """Import what makes scripts start slowly."""
    import datasets  # noqa: F401
    import lm_eval
    import lm_eval.models.huggingface  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def _drain(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def _be_job(order: dict[str, Any], output: int, count: int) -> None:
    """Become the script; never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(order["root"])
        for name, value in order["environment"].items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        if order["user"]:
            os.setgroups([])
            os.setgid(order["user"])
            os.setuid(order["user"])
        sys.argv = order["command"]
        sys.path[0] = str(Path(order["root"], sys.argv[0]).parent)
        changes = strike_at(order["strike"], Path(order["root"], "results"))
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        os.write(count, str(changes()).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def strike_at(strike: int, folder: Path) -> Callable[[], int]:
    """Kill this process just before its ``strike``-th change below ``folder``, logs apart; returns the count so far."""
    seen = 0
    inside, logs = f"{folder}{os.sep}", f"{os.sep}logs{os.sep}"

    def change() -> None:
        nonlocal seen
        seen += 1
        if seen == strike:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in CHANGES
        if writes and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (a hook must not open anything)
            if path.startswith(inside) and logs not in path:
                change()

    sync = os.fsync

    def fsync(descriptor: Any) -> None:
        change()
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(watch)
    return lambda: seen


if __name__ == "__main__":
    serve()
