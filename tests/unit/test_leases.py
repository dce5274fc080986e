"""Leases of fake devices by many real processes, and what CUDA_VISIBLE_DEVICES means."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from evopress.util import accelerators
from evopress.util.accelerators import (
    Card,
    Device,
    built_for_cuda,
    leased,
    lock_file,
    parse_listing,
    usable_devices,
    visible_devices,
)
from evopress.util.errors import ConfigError

A, B, C = (Card(f"GPU-{letter * 8}-0000-0000-0000-000000000000", "Big") for letter in "abc")
SMALL = Card("GPU-99999999-0000-0000-0000-000000000000", "Small")
CUT = Card("GPU-dddddddd-0000-0000-0000-000000000000", "Big", ("MIG-11111111-2222", "MIG-33333333-4444"))


def never(environment: object) -> list[str]:
    raise AssertionError("CUDA need not be asked")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, [A.uuid, B.uuid, CUT.instances[0], CUT.instances[1]]),
        ("", []),
        ("1", [B.uuid]),
        ("1, 0", [B.uuid, A.uuid]),
        ("0,0", [A.uuid]),
        ("0,-1,1", [A.uuid]),
        ("0,7,1", [A.uuid]),
        ("NoDevFiles", []),
        ("GPU-bbbb", [B.uuid]),
        (f"{B.uuid},{A.uuid}", [B.uuid, A.uuid]),
        ("GPU-", []),
        ("MIG-3333", [CUT.instances[1]]),
        ("2", [CUT.instances[0]]),
        ("MIG-GPU-dddddddd/1/0", ["MIG-GPU-dddddddd/1/0"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(named: str | None, expected: list[str]) -> None:
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert [device.identity for device in visible_devices(environment, [A, B, CUT], never)] == expected


def test_numbers_among_unlike_cards_are_asked_of_cuda_unless_their_order_is_set() -> None:
    cards = [SMALL, A]  # CUDA counts the faster one first
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    asked = visible_devices(environment, cards, lambda environment: [A.uuid, SMALL.uuid])
    assert asked == [Device("0", A.uuid), Device("1", SMALL.uuid)]
    ordered = visible_devices(environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, cards, never)
    assert ordered == [Device("0", SMALL.uuid), Device("1", A.uuid)]
    by_uuid = visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-aaa"}, cards, never)
    assert by_uuid == [Device("GPU-aaa", A.uuid)]


LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA GeForce RTX 3090 (UUID: GPU-0a1b2c3d-0000-1111-2222-333344445555)
"""


def test_the_listing_of_nvidia_smi_is_read() -> None:
    first, second = parse_listing(LISTING)
    assert first.uuid == "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77" and first.model == "NVIDIA A100-SXM4-40GB"
    assert [unit[:12] for unit in first.units] == ["MIG-c6d4f1ef", "MIG-cba663e8"]
    assert second == Card("GPU-0a1b2c3d-0000-1111-2222-333344445555", "NVIDIA GeForce RTX 3090")
    assert parse_listing("No devices were found\n") == []


def fake_smi(folder: Path, text: str, code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_usable_devices_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path / "bin", LISTING)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(accelerators, "built_for_cuda", lambda: True)
    assert len(usable_devices({})) == 3
    assert [d.entry for d in usable_devices({"CUDA_VISIBLE_DEVICES": "GPU-0a"})] == ["GPU-0a"]
    monkeypatch.setattr(accelerators, "built_for_cuda", lambda: False)
    assert usable_devices({}) == []


def test_the_drivers_files_stand_in_for_nvidia_smi(tmp_path: Path) -> None:
    for minor, (address, uuid) in enumerate([("0000:01:00.0", A.uuid), ("0000:41:00.0", B.uuid)]):
        folder = tmp_path / "gpus" / address
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t Big\nGPU UUID:\t {uuid}\nDevice Minor: \t {minor}\n")
    (tmp_path / "nvidia1").touch()  # the other was not handed to this container
    assert accelerators._cards_of_driver(tmp_path / "gpus", tmp_path) == [B]


def test_torch_is_not_imported_to_learn_what_it_was_built_for() -> None:
    code = (
        "import sys, evopress.util.accelerators as accelerators; accelerators.built_for_cuda();"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    import torch

    assert built_for_cuda() == (torch.version.cuda is not None)


def devices(*cards: Card) -> list[Device]:
    return [Device(card.uuid, card.uuid) for card in cards]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "locks").mkdir()
    return {"EVOPRESS_LEASES": str(tmp_path / "locks")}


def test_concurrent_leases_get_different_devices(environment: dict[str, str]) -> None:
    with leased("auto", environment=environment, find=lambda _: devices(A, B)) as first:
        assert environment["CUDA_VISIBLE_DEVICES"] == A.uuid
        other = {**environment, "CUDA_VISIBLE_DEVICES": "0,1"}
        named = [Device("0", A.uuid), Device("1", B.uuid)]  # the same devices by other names
        with leased("cuda", environment=other, find=lambda _: named) as second:
            assert (first, second) == (devices(A), named[1:])
            assert other["CUDA_VISIBLE_DEVICES"] == "1"
        assert other["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_an_explicit_device_is_the_one_that_is_leased(environment: dict[str, str]) -> None:
    with leased("cuda:1", environment=environment, find=lambda _: devices(A, B)) as first:
        assert first == devices(B)
        assert "CUDA_VISIBLE_DEVICES" not in environment  # its number must stay what it is
    with leased("cuda:5", environment=environment, find=lambda _: devices(A)) as none:
        assert none == []


@pytest.mark.parametrize(
    ("name", "count", "found"), [("cpu", 1, [A]), ("auto", 0, [A]), ("auto", 1, []), ("mps", 1, [A])]
)
def test_nothing_happens_where_no_device_is_used(
    environment: dict[str, str], name: str, count: int, found: list[Card]
) -> None:
    with leased(name, count, environment=environment, find=lambda _: devices(*found)) as none:
        assert none == [] and set(environment) == {"EVOPRESS_LEASES"}
    assert not list(Path(environment["EVOPRESS_LEASES"]).iterdir())


def test_more_processes_than_devices_is_an_error(environment: dict[str, str]) -> None:
    with (
        pytest.raises(ConfigError, match=r"compute.processes: 3 need a CUDA device each, and 2 are visible"),
        leased("auto", 3, environment=environment, find=lambda _: devices(A, B)),
    ):
        pass


def test_a_folder_that_cannot_hold_locks_is_an_error_that_says_what_to_do(environment: dict[str, str]) -> None:
    environment["EVOPRESS_LEASES"] += "/missing"
    try:
        with leased("auto", environment=environment, find=lambda _: devices(A)):
            raise AssertionError
    except ConfigError as error:
        assert "set EVOPRESS_LEASES to a folder" in str(error)


def test_lock_files_are_for_all_users_whatever_the_umask_and_no_name_leaves_the_folder(
    environment: dict[str, str],
) -> None:
    folder = Path(environment["EVOPRESS_LEASES"])
    before = os.umask(0o077)
    try:
        with leased("auto", environment=environment, find=lambda _: [Device("x", "MIG-GPU-../../x/1/0\n;")]):
            [path] = folder.iterdir()
            assert path.stat().st_mode & 0o777 == 0o666 and path.stat().st_size == 0
    finally:
        os.umask(before)
    assert lock_file(folder, "a/b") != lock_file(folder, "a_b")
    assert lock_file(folder, "../x").parent == folder


def test_a_lock_on_a_removed_file_does_not_count(environment: dict[str, str]) -> None:
    path = lock_file(Path(environment["EVOPRESS_LEASES"]), A.uuid)
    with leased("auto", environment=environment, find=lambda _: devices(A)):
        path.unlink()  # by someone who tidies up
    with leased("auto", environment=environment, find=lambda _: devices(A)) as held:
        assert held == devices(A) and path.exists()


HOLDER = """
import random, sys, time
from evopress.util.accelerators import Device, leased
names, count, rounds, longest, path = sys.argv[1].split(","), *map(int, sys.argv[2:4]), float(sys.argv[4]), sys.argv[5]
with open(path, "a", buffering=1) as events:
    for _ in range(rounds):
        with leased("auto", count, find=lambda _: [Device(n, n) for n in names], poll_seconds=0.005) as held:
            for device in held:
                print("enter", device.identity, time.monotonic_ns(), file=events)
            time.sleep(random.uniform(0, longest))
            for device in held:
                print("leave", device.identity, time.monotonic_ns(), file=events)
    print("done", "-", 0, file=events)
"""


class Holders:
    """Processes that lease devices again and again, and write down when."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, os.environ | environment
        self.started: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.killed: dict[Path, int] = {}

    def start(self, names: str, count: int = 1, rounds: int = 20, longest: float = 0.01) -> None:
        path = self.folder / f"events_{len(self.started)}"
        arguments = [names, str(count), str(rounds), str(longest), str(path)]
        process = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], env=self.environment)
        self.started.append((process, path))

    def kill(self, number: int) -> None:
        process, path = self.started[number]
        self.killed[path] = time.monotonic_ns()
        process.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        for process, path in self.started:
            code = process.wait(timeout=50)
            assert code == 0 or path in self.killed

    def stop(self) -> None:
        for process, _ in self.started:
            process.kill()
            process.wait()

    def events(self, number: int) -> list[list[str]]:
        path = self.started[number][1]
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def intervals(self) -> dict[str, list[tuple[int, int]]]:
        """When each device was held; a killed holder held it until it was killed at least."""
        held: dict[str, list[tuple[int, int]]] = {}
        for number, (_, path) in enumerate(self.started):
            since: dict[str, int] = {}
            for event, device, moment in self.events(number):
                if event == "enter":
                    since[device] = int(moment)
                elif event == "leave":
                    held.setdefault(device, []).append((since.pop(device), int(moment)))
            for device, start in since.items():
                held.setdefault(device, []).append((start, max(start, self.killed[path])))
        return {device: sorted(times) for device, times in held.items()}


@pytest.fixture
def holders(tmp_path: Path, environment: dict[str, str]) -> Iterator[Holders]:
    made = Holders(tmp_path, environment)
    yield made
    made.stop()


def assert_alone(intervals: dict[str, list[tuple[int, int]]]) -> None:
    for device, times in intervals.items():
        for (_, end), (start, _) in pairwise(times):
            assert end <= start, device


def test_never_two_holders_at_once_and_hidden_devices_are_never_locked(holders: Holders, tmp_path: Path) -> None:
    for _ in range(5):
        holders.start("d0,d1,d2", rounds=25)
    for _ in range(3):
        holders.start("d1,d2", rounds=25)  # d0 is hidden from these
    for _ in range(2):
        holders.start("d0,d1,d2", count=2, rounds=10)
    holders.start("d0,d1,d2", count=3, rounds=5)
    holders.wait()
    intervals = holders.intervals()
    assert_alone(intervals)
    assert set(intervals) == {"d0", "d1", "d2"}
    assert sum(map(len, intervals.values())) == 5 * 25 + 3 * 25 + 2 * 10 * 2 + 5 * 3
    for number in range(5, 8):
        assert {device for _, device, _ in holders.events(number)} <= {"d1", "d2", "-"}
    names = {path.name for path in (tmp_path / "locks").iterdir()}
    assert names == {f"evopress-device-{name}.lock" for name in ("d0", "d1", "d2", "several")}


def test_a_killed_holder_frees_its_devices(holders: Holders) -> None:
    randomness = random.Random(0)
    for _ in range(8):
        holders.start("d0,d1", rounds=10_000, longest=0.02)
    for _ in range(2):
        holders.start("d0,d1", count=2, rounds=10_000, longest=0.02)
    deadline = time.monotonic() + 20
    while not all(holders.events(number) for number in range(10)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in randomness.sample(range(10), 10):
        time.sleep(randomness.uniform(0, 0.1))
        holders.kill(number)
    holders.start("d0,d1", count=2, rounds=3)
    holders.wait()
    assert_alone(holders.intervals())
    assert holders.events(10)[-1][0] == "done"


def test_a_job_that_waits_says_so(environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("evopress").propagate = True
    release = threading.Event()
    found = [Device("0", "d0")]

    def wait() -> None:
        with leased("auto", environment=dict(environment), find=lambda _: found, poll_seconds=0.01):
            release.set()

    waiting = "waiting for 1 of the devices 0: other jobs hold them"
    with caplog.at_level(logging.INFO, "evopress"):
        with leased("auto", environment=environment, find=lambda _: found):
            thread = threading.Thread(target=wait)
            thread.start()
            while waiting not in caplog.messages:
                time.sleep(0.01)
            assert not release.wait(0.2)
        thread.join(timeout=20)
    assert release.is_set()
    assert caplog.messages.count(waiting) == 1
    assert caplog.messages[-1] == "leased 0"
