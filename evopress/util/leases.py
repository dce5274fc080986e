"""Devices of a job's own: jobs that run at once on a machine lease different ones.

A lease is a lock on one small file for each device, which the kernel gives back when its holder ends, however it ends.
The files lie where all users of a machine meet, are never written to, and stay.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from evopress.util.accelerators import VISIBLE, Device, usable_devices
from evopress.util.errors import ConfigError
from evopress.util.progress import log

FOLDER_VARIABLE = "EVOPRESS_LEASES"
"""Names another folder: one that is shared, where containers with a /tmp of their own share devices."""
_FOLDER = Path("/tmp")  # noqa: S108 (TMPDIR would differ by user; nothing is read from these files or written to them)
_POLL_SECONDS = 0.5


@contextmanager
def leased(
    name: str,
    count: int = 1,
    *,
    environment: MutableMapping[str, str] = os.environ,
    find: Callable[[MutableMapping[str, str]], Sequence[Device]] = usable_devices,
    poll_seconds: float = _POLL_SECONDS,
) -> Iterator[list[Device]]:
    """Hold devices that no other lease on this machine holds while the enclosed work runs; waits for them.

    To be entered before CUDA is initialised: CUDA_VISIBLE_DEVICES names the leased devices alone meanwhile. Without
    CUDA devices, nothing happens.

    Args:
        name: `compute.device`: ``auto`` and ``cuda`` take any visible devices, ``cuda:N`` just that one (whose number
            stays what it is). Others need no lease.
        count: devices that the job needs; 0 for none.
        environment: of this process.
        find: devices visible to it.
        poll_seconds: time between two looks at devices that are taken.

    Raises:
        ConfigError: more devices are asked for than are visible, or the folder of the locks cannot be used.
    """
    explicit = re.fullmatch(r"cuda:(\d+)", name)
    visible = list(find(environment)) if count and (explicit or name in ("auto", "cuda")) else []
    if explicit:  # one that is not there is for whoever resolves the name to report
        visible, count = visible[int(explicit[1]) :][:1], 1
    if not visible:
        yield []
        return
    if len(visible) < count:
        raise ConfigError(f"compute.processes: {count} need a CUDA device each, and {len(visible)} are visible")
    with ExitStack() as locks:
        devices = _hold(visible, count, Path(environment.get(FOLDER_VARIABLE) or _FOLDER), locks, poll_seconds)
        if explicit:
            yield devices
            return
        before = environment.get(VISIBLE)
        environment[VISIBLE] = ",".join(device.entry for device in devices)
        try:
            yield devices
        finally:
            environment.pop(VISIBLE)
            if before is not None:
                environment[VISIBLE] = before


def _hold(visible: Sequence[Device], count: int, folder: Path, locks: ExitStack, poll: float) -> list[Device]:
    """Lock ``count`` of the devices.

    Whoever needs several keeps what is free and waits for the rest, else it could wait for ever beside jobs that need
    one. Only one job of a machine does so at a time: two could each keep what the other waits for.
    """
    paths = {lock_file(folder, device.identity): device for device in visible}
    with ExitStack() as turn:
        if count > 1:
            _lock([lock_file(folder, "several")], 1, turn, poll, "its turn to take several devices")
        names = ", ".join(device.entry for device in visible)
        taken = _lock(list(paths), count, locks, poll, f"{count} of the devices {names}")
    devices = [device for path, device in paths.items() if path in taken]
    log.info("leased %s", ", ".join(device.entry for device in devices))
    return devices


def lock_file(folder: Path, identity: str) -> Path:
    """File whose lock is the lease of a device."""
    plain = re.sub(r"[^\w-]", "_", identity)[:80]
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:8] if plain != identity else ""
    return folder / f"evopress-device-{plain}{digest}.lock"


def _lock(paths: Sequence[Path], count: int, locks: ExitStack, poll: float, what: str) -> set[Path]:
    """Lock ``count`` of the files, until ``locks`` is closed."""
    taken: set[Path] = set()
    started = time.monotonic()
    while True:
        for path in paths:
            if len(taken) < count and path not in taken and (lock := _try_lock(path)) is not None:
                locks.callback(lock.release)
                taken.add(path)
        waited = time.monotonic() - started
        if len(taken) == count:
            if waited >= poll:
                log.info("waited %.0f s", waited)
            return taken
        if waited < poll:
            log.info("waiting for %s: other jobs hold them", what)
        time.sleep(poll)


def _try_lock(path: Path) -> BaseFileLock | None:
    """The lock of a file, held, or None where another one holds it.

    Every user may lock the file, whoever made it. A file system without locks that the kernel gives back is an error:
    what stands in for them there would outlive a killed job.
    """
    lock = FileLock(path, blocking=False, mode=0o666, fallback_to_soft=False, thread_local=False)
    try:
        path.parent.stat()  # filelock would make the folder, for this user alone
        lock.acquire()
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        raise ConfigError(
            f"{path}: cannot be locked to lease a device ({getattr(error, 'strerror', error)}); set {FOLDER_VARIABLE} "
            "to a folder that all who use the devices can write to"
        ) from error
    return lock
