"""Commands that messages advise."""

import os
import sys
from pathlib import Path

from evopress.config.base import snakemake_command


def python_with_snakemake(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("python", "snakemake"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_it_names_the_files_of_the_settings(tmp_path, monkeypatch):
    folder = python_with_snakemake(tmp_path / "venv/bin")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    command = snakemake_command(Path("results/a/model.json"), [Path("my file.yaml"), Path("b.yaml")])
    assert command == "snakemake --cores all results/a/model.json --configfile 'my file.yaml' b.yaml"
    assert snakemake_command(Path("results/a/model.json"), []) == "snakemake --cores all results/a/model.json"


def test_a_snakemake_that_the_shell_does_not_find_is_named_by_its_path(tmp_path, monkeypatch):
    folder = python_with_snakemake(tmp_path / "venv/bin")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert snakemake_command(Path("x"), []).startswith("venv/bin/snakemake ")
    monkeypatch.chdir("/")
    assert snakemake_command(Path("x"), []).split()[0].endswith("venv/bin/snakemake")
    (folder / "snakemake").unlink()
    assert snakemake_command(Path("x"), []).startswith(f"{folder / 'python'} -m snakemake ")
