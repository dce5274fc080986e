"""Jobs that make the variants of several blocks: killed, damaged and let loose twice, they end as jobs of one block."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_variants import BLOCKS, CPU, SETTINGS, make_all, prepare, write_hessians

from evopress.artifacts.paths import Run
from evopress.artifacts.tensors import read_tensors
from evopress.compression import block_files, stage
from evopress.compression.stage import make_variants
from evopress.config.context import StageContext

ALL = list(range(BLOCKS))


def contents(run: Run) -> dict[str, bytes]:
    """Every file of the variants `q`, by its path."""
    folder = run.variant_table("q", 0).parent
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """What jobs of one block write."""
    run = prepare(tmp_path / "apart")
    make_all(run)
    return contents(run)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return prepare(tmp_path / "together")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Blocks that are compressed, in turn."""
    blocks: list[str] = []
    compress = stage.compress_layers

    def counted(context: StageContext, description: str, *arguments: object) -> object:
        blocks.append(description.rpartition(" ")[2])
        return compress(context, description, *arguments)

    monkeypatch.setattr(stage, "compress_layers", counted)
    yield blocks


def kill_at(block: int, run: Run, monkeypatch: pytest.MonkeyPatch, key: str = "") -> None:
    """Make variants of all blocks in one job, which is killed before a block is compressed."""
    compress = stage.compress_layers

    def killed(context: StageContext, description: str, *arguments: object) -> object:
        if description.endswith(f"block {block}"):
            raise KeyboardInterrupt
        return compress(context, description, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "compress_layers", killed)
        make_variants(StageContext(run, CPU, key=key), "q", SETTINGS, ALL)


def test_one_job_writes_what_jobs_of_one_block_write(run: Run, expected: dict[str, bytes]) -> None:
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert contents(run) == expected


def test_a_killed_job_goes_on_with_the_block_that_it_was_at(
    run: Run, expected: dict[str, bytes], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(1, run, monkeypatch)
    assert not run.variant_table("q", 0).exists(), "Snakemake would remove it"
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert made == ["0", "1"]
    assert contents(run) == expected


def test_a_job_killed_while_files_change_places_makes_nothing_again(
    run: Run, expected: dict[str, bytes], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = block_files._take

    def killed(source: Path, temporary: Path) -> None:
        if source == run.made_table("q", 1):
            raise KeyboardInterrupt
        take(source, temporary)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block_files, "_take", killed)
        make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    for path in (run.variant_table("q", 0), run.variant_tensors("q", 0)):
        path.unlink()  # as Snakemake does
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert made == ["0", "1"]
    assert contents(run) == expected


def test_what_another_key_made_is_not_taken(run: Run, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(1, run, monkeypatch, key="old")
    make_variants(StageContext(run, CPU, key="new"), "q", SETTINGS, ALL)
    assert made == ["0", "0", "1"]


def test_what_other_hessians_made_is_not_taken(run: Run, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a killed job, where a file of calibration text was edited before the next run."""
    kill_at(1, run, monkeypatch)
    write_hessians(run, 0, {group: 2 * hessian for group, hessian in read_tensors(run.hessian(0)).items()})
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert made == ["0", "0", "1"]


def test_a_damaged_block_is_made_again(
    run: Run, expected: dict[str, bytes], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(1, run, monkeypatch)
    path = run.made_tensors("q", 0)
    path.write_bytes(path.read_bytes()[:-1])
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert made == ["0", "0", "1"]
    assert contents(run) == expected


def test_logs_of_earlier_jobs_of_the_same_blocks_go(run: Run) -> None:
    logs = [run.variants_log("q", block) for block in (*ALL, "embedding")]
    logs[0].parent.mkdir(parents=True)
    for log in logs:
        log.touch()
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert [log.exists() for log in logs] == [True, False, True]


def test_another_job_may_have_ended_with_the_same_blocks(run: Run, expected: dict[str, bytes]) -> None:
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    block_files.put_in_place(run, "q", ALL)
    assert contents(run) == expected


def test_files_are_moved_where_the_disk_has_no_second_names(
    run: Run, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    make_variants(StageContext(run, CPU), "q", SETTINGS, ALL)
    assert contents(run) == expected
