"""`evopress verify`: every artifact of a run is read again, and each that is damaged or missing is named."""

from pathlib import Path

import pytest
from finished_run import write_configuration
from search_run import prepare

from evopress.artifacts.paths import Run, manifest_path
from evopress.cli.commands import main
from evopress.config.context import StageContext
from evopress.export.exporters.archive import Archive
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an artifact of each kind."""
    run = prepare(tmp_path_factory.mktemp("verify"))
    write_configuration(run, "evo", level="3")
    for exporter in (HuggingFace(), Archive()):
        run_export(StageContext(run), "evo", exporter)
    return run


def verify(run: Run, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    code = main(["verify", str(run.root)])
    return code, *capsys.readouterr()


def test_a_whole_run(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, errors = verify(made, capsys)
    assert (code, errors) == (0, "") and output.endswith("artifacts are as they were written\n")


@pytest.mark.parametrize(
    "path",
    [
        "layers.parquet",
        "tokens/search.parquet",
        "hessians/block_000.safetensors",
        "hessians/block_001.json",
        "variants/gptq/block_000.safetensors",
        "variants/gptq/block_001.parquet",
        "search/evo/configuration.parquet",
        "exports/evo/huggingface/model.safetensors",
        "exports/evo/huggingface/config.json",
        "exports/evo/huggingface.json",
        "exports/evo/archive/archive.safetensors",
    ],
)
def test_a_changed_bit_is_named_with_what_to_do(made: Run, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = made.root / path
    content = file.read_bytes()
    place = -5 if path.endswith(".safetensors") else len(content) // 2
    changed = bytearray(content)
    changed[place] ^= 0x11
    file.write_bytes(changed)
    try:
        code, output, errors = verify(made, capsys)
    finally:
        file.write_bytes(content)
    [line] = output.splitlines()
    assert code == 1 and line.startswith(f"{file}: damaged (") and " again" in line
    assert "1 of " in errors and "artifacts are damaged or missing" in errors


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hessians/block_000.safetensors", "missing; run the stage that writes it"),
        ("variants/gptq/block_000.parquet", "missing; run the stage that writes it"),
        ("exports/evo/huggingface/config.json", r"damaged (missing); delete "),
    ],
)
def test_what_is_missing_is_named(made: Run, path: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = made.root / path
    content = file.read_bytes()
    file.unlink()
    try:
        code, output, _ = verify(made, capsys)
    finally:
        file.write_bytes(content)
    assert code == 1 and output.startswith(f"{file}: {said}")


def test_tensors_without_their_manifest_are_not_finished(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_path(made.variant_tensors("gptq", 1))
    content = manifest.read_bytes()
    manifest.unlink()
    try:
        code, output, _ = verify(made, capsys)
    finally:
        manifest.write_bytes(content)
    assert code == 1 and output.startswith(f"{manifest}: missing")


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = verify(Run(tmp_path / "nothing"), capsys)
    assert code == 1 and "holds no results; give the folder of a run" in errors
