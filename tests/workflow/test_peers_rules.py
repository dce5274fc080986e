"""llama.cpp's quantizer as a peer through the workflow: run on a tiny model, and asked what runs again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf_layouts import byte_level, folder_of, tiny
from planning import Checkout
from test_incremental import EDIT, edited, replaced

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import PEERS, read_table
from evopress.util.errors import ConfigError
from evopress.workflow.reference import rows
from studies.paths import peer_file_path, peers_path, sections_path, text_path
from studies.run import StudiedSettings
from studies.settings import find_program

NAMES = ("Q4_K_S", "Q2_K", "Q4_K_S-Q4_0", "Q2_K-Q4_0")
REPORT = {"study_report", "report"}
GATHERED = {"study_peers"} | REPORT
FILES = {f"{rule} {name}" for rule in ("study_peer_file", "study_peer", "study_peer_search") for name in NAMES}
SEARCHES = {f"study_peer_search {name}" for name in NAMES}
CHANGES: list[tuple[str, Any, set[str]]] = [
    (
        "studies.peers.types",
        ["Q4_K_S", "Q2_K", "Q6_K"],
        {
            f"{rule} Q6_K{end}"
            for rule in ("study_peer_file", "study_peer", "study_peer_search")
            for end in ("", "-Q4_0")
        }
        | GATHERED,
    ),
    ("studies.peers.embeddings", [None], GATHERED),
    ("studies.peers.quantizer", "{program}", FILES | GATHERED),
    ("studies.peers.against", None, GATHERED),
    ("searches.dp.target", 5.0, SEARCHES | GATHERED),
    ("data.evaluation.held.seed", 1, {f"study_peer {name}" for name in NAMES} | SEARCHES | GATHERED),
    ("hessians.shards", 2, {"study_peer_sources"} | FILES | GATHERED),
]


@pytest.fixture(scope="module")
def compared_settings(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny run on a model that GGUF can hold."""
    folder = folder_of(tiny("llama-tied"), tmp_path_factory.mktemp("model"), byte_level())
    search = {"strategy": "dp", "variants": "gguf", "target": 4.0, "exports": [{"exporter": "gguf", "dense": "q8_0"}]}
    return {
        **settings,
        "model": {"source": "folder", "path": str(folder)},
        "variants": {"gguf": {"method": "gguf", "types": ["Q2_K", "Q4_K", "Q6_K"]}},
        "searches": {"dp": search},
        "studies": {"peers": {"types": ["Q4_K_S", "Q2_K"], "embeddings": [None, "Q4_0"], "against": "dp"}},
    }


@pytest.fixture(scope="module")
def compared(compared_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the study has ended."""
    try:
        find_program(None)
    except ConfigError as error:
        pytest.skip(str(error))
    checkout = Checkout.make(tmp_path_factory.mktemp("compared") / "evopress")
    outcome = checkout.run(compared_settings, "peers", patience=1800)
    assert outcome.returncode == 0, outcome.stderr
    assert "Files of llama.cpp's quantizer" in outcome.stdout
    return checkout


def test_the_study_ends_in_a_table_and_in_the_report(compared: Checkout) -> None:
    run = Run(compared.root / "results/tiny")
    table = read_table(peers_path(run), PEERS)
    assert set(table["peer"]) == set(NAMES) and set(table["maker"]) == {"llama.cpp", "dp"}
    assert "comparisons, by a third or more" in text_path(peers_path(run)).read_text()
    assert "<h2>llama.cpp&#39;s quantizer</h2>" in run.report.read_text()
    assert all(peer_file_path(run, name).is_file() for name in NAMES)


def test_nothing_repeats_without_a_reason(compared: Checkout, compared_settings: dict[str, Any]) -> None:
    assert compared.plan(compared_settings, targets=["peers"]) <= {"peers"}


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES, ids=[path for path, _, _ in CHANGES])
def test_a_setting_repeats_what_depends_on_it(
    compared: Checkout, compared_settings: dict[str, Any], tmp_path: Path, path: str, value: Any, expected: set[str]
) -> None:
    if value == "{program}":
        value = shutil.copy(find_program(None), tmp_path / "llama-quantize").as_posix()
    planned = compared.plan(replaced(compared_settings, path, value, tmp_path), targets=["peers"])
    assert {job for job in planned if "peer" in job or "report" in job} - {"peers"} == expected


def test_every_setting_of_the_study_is_in_the_table() -> None:
    wanted = {row.path for row in rows(StudiedSettings) if row.path.startswith("studies.peers.")}
    assert wanted == {path for path, _, _ in CHANGES} & wanted and len(wanted) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("workflow/studies/rivals.py", SEARCHES | GATHERED),
        ("workflow/studies/recipes.py", FILES | {"study_peer_sources"} | GATHERED),
        ("workflow/studies/plots.py", REPORT),
    ],
)
def test_edited_code_repeats_what_it_makes(
    compared: Checkout, compared_settings: dict[str, Any], name: str, expected: set[str]
) -> None:
    with edited(compared.root / name, EDIT):
        assert compared.plan(compared_settings, targets=["peers"]) - {"peers"} == expected


def test_a_file_that_is_gone_is_made_again_alone(compared: Checkout, compared_settings: dict[str, Any]) -> None:
    """What a run that was killed has not made; the others stay."""
    path = sections_path(Run(compared.root / "results/tiny"))
    aside = path.rename(path.with_suffix(".aside"))
    try:
        assert compared.plan(compared_settings, targets=["peers"]) - {"peers"} == REPORT
    finally:
        aside.rename(path)
