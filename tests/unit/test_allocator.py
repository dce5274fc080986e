"""Memory that is freed and asked for again."""

import platform
import subprocess
import sys

import pytest

from evopress.util.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_glibc_takes_the_settings():
    code = "from evopress.util.allocator import keep_freed_memory; print(keep_freed_memory())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)  # not in this one
    assert told.stdout.strip() == "True"


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
