"""CUDA devices of this machine: which of them a process may use, and leases, by which jobs that run at once share them.

All of it is told without CUDA: once that is initialised, the choice cannot be narrowed.

CUDA_VISIBLE_DEVICES names devices by number, by UUID or by the start of one; numbers count what the process could see
without it (in a container, or under SLURM with cgroups, not all of the host). So every device gets an identity that
holds on the whole host: its UUID, or that of its MIG instance.

A lease is a lock on one small file for each device, which the kernel gives back when its holder ends, however it ends.
The files lie where all users of a machine meet, are never written to, and stay.
"""

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from evopress.util.errors import ConfigError
from evopress.util.progress import log

VISIBLE = "CUDA_VISIBLE_DEVICES"
_PATIENCE_SECONDS = 120.0
"""nvidia-smi takes long where the driver starts with it."""
_LINE = re.compile(r"(?P<gpu>GPU \d+: )?(?P<model>.*?)\s*\(UUID: (?P<uuid>[\w-]+)\)")
_ASK_CUDA = (
    "import torch; print(*('GPU-' + str(torch.cuda.get_device_properties(i).uuid).removeprefix('GPU-')"
    " for i in range(torch.cuda.device_count())), sep='\\n')"
)


@dataclass(frozen=True)
class Card:
    """A GPU of the machine."""

    uuid: str
    model: str = ""
    instances: tuple[str, ...] = ()
    """UUIDs of its MIG instances, where it is cut into such: then one of them is used, never the whole."""

    @property
    def units(self) -> tuple[str, ...]:
        """What can be used by one process each."""
        return self.instances or (self.uuid,)


@dataclass(frozen=True)
class Device:
    """What one process uses."""

    entry: str
    """Its name in CUDA_VISIBLE_DEVICES."""
    identity: str
    """The same from everywhere on the host."""


def usable_devices(environment: Mapping[str, str] = os.environ) -> list[Device]:
    """Devices that torch would use in this environment; none where it was built without CUDA, or there is no driver."""
    if not (shutil.which("nvidia-smi") or _PROC.is_dir()) or not built_for_cuda():
        return []
    return visible_devices(environment, cards(), _ask_cuda)


def visible_devices(
    environment: Mapping[str, str],
    cards: Sequence[Card],
    order: Callable[[Mapping[str, str]], Sequence[str]],
) -> list[Device]:
    """Devices among ``cards`` that CUDA_VISIBLE_DEVICES leaves, in its order.

    Args:
        environment: environment of the process.
        cards: those that the driver shows to the process, in the order of their PCI addresses.
        order: UUIDs in CUDA's own order, asked for only where numbers do not tell: among unlike cards CUDA counts the
            fastest first, unless CUDA_DEVICE_ORDER says otherwise.
    """
    named = environment.get(VISIBLE)
    if named is None:
        return [Device(unit, unit) for card in cards for unit in card.units]
    entries = [entry.strip() for entry in named.split(",")]
    by_number = any(re.fullmatch(r"\d+", entry) for entry in entries)
    if by_number and len({card.model for card in cards}) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return _distinct(zip(entries, order(environment), strict=False))
    return _distinct((entry, identity) for entry, identity in _until_invalid(entries, cards))


def cards() -> list[Card]:
    """Cards that the driver shows to this process, by PCI address."""
    program = shutil.which("nvidia-smi")
    if program:
        with suppress(OSError, subprocess.SubprocessError):
            listing = subprocess.run(
                [program, "-L"], capture_output=True, text=True, check=True, timeout=_PATIENCE_SECONDS
            ).stdout
            return parse_listing(listing)
    return _cards_of_driver()


def parse_listing(text: str) -> list[Card]:
    """Cards in the output of `nvidia-smi -L`: a line for each, and indented ones for its MIG instances."""
    found: list[Card] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match and match["gpu"]:
            found.append(Card(match["uuid"], match["model"]))
        elif match and found:
            last = found[-1]
            found[-1] = Card(last.uuid, last.model, (*last.instances, match["uuid"]))
    return found


def built_for_cuda() -> bool:
    """Whether the installed torch knows CUDA; read from its version file, since importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda") is not None
    except OSError:
        return True


_PROC = Path("/proc/driver/nvidia/gpus")


def _cards_of_driver(root: Path = _PROC, devices: Path = Path("/dev")) -> list[Card]:
    """The same from the driver's files, where nvidia-smi is missing; a card that may not be opened is left out."""
    found = []
    for path in sorted(root.glob("*/information")):
        with suppress(OSError):
            facts = dict(re.findall(r"^(.+?):\s*(.*?)\s*$", path.read_text(encoding="utf-8", errors="replace"), re.M))
            os.close(os.open(devices / f"nvidia{facts.get('Device Minor', '')}", os.O_RDWR))
            found.append(Card(facts.get("GPU UUID", path.parent.name), facts.get("Model", "")))
    return found


def _until_invalid(entries: Sequence[str], cards: Sequence[Card]) -> Iterator[tuple[str, str]]:
    """Entries with identities; like CUDA, nothing counts from the first one on that names no device."""
    for entry in entries:
        identity = _identity(entry, cards)
        if identity is None:
            return
        yield entry, identity


def _identity(entry: str, cards: Sequence[Card]) -> str | None:
    if re.fullmatch(r"\d+", entry):
        number = int(entry)
        return cards[number].units[0] if number < len(cards) else None
    if entry.startswith("MIG-"):
        found = [unit for card in cards for unit in card.instances if unit.startswith(entry)]
        return found[0] if len(found) == 1 else entry  # older drivers write MIG-GPU-<uuid>/<instance>/<instance>
    found = [card.units[0] for card in cards if entry.startswith("GPU-") and card.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _distinct(pairs: Iterator[tuple[str, str]]) -> list[Device]:
    """A device that is named twice is one."""
    found: dict[str, Device] = {}
    for entry, identity in pairs:
        found.setdefault(identity, Device(entry, identity))
    return list(found.values())


def _ask_cuda(environment: Mapping[str, str]) -> list[str]:
    """UUIDs of visible devices in CUDA's order, by a process of its own, so that CUDA stays uninitialised in this."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK_CUDA], capture_output=True, text=True, check=False, env=dict(environment)
    )
    return done.stdout.split() if done.returncode == 0 else []


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
