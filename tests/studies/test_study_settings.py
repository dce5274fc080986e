"""Settings of studies: what is refused and how it is said, overlays, and what is generated from the classes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from evopress.artifacts import tables
from evopress.util.errors import ConfigError
from evopress.workflow.reference import TABLES, artifacts, rows, schema, updated_readme
from evopress.workflow.settings import Settings, lay_over
from studies.run import StudiedSettings, reported_studies, studied_slices
from studies.settings import MonotonicitySettings, require_text

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT = yaml.safe_load((REPOSITORY / "config/smollm2-3bit.yaml").read_text())
PAIRS = {"variants": "gptq", "target": 3, "confirm_tokens": 4096}


def load(studies: Any, **others: Any) -> StudiedSettings:
    return StudiedSettings.load(lay_over(DEFAULT, {"studies": studies, **others}))


@pytest.mark.parametrize(
    ("studies", "message"),
    [
        ({"convergense": {}}, "studies: unknown key 'convergense': did you mean 'convergence'?"),
        ({"convergence": {"unit": [3]}}, "studies.convergence: unknown key 'unit': did you mean 'units'?"),
        ({"convergence": {"kept": [1.5]}}, "studies.convergence.kept.0: Input should be less than 1"),
        (None, "studies: is empty: give it keys, or leave it out"),
        ({"monotonicity": {"a/b": PAIRS}}, "'a/b' cannot name a file"),
        ({"monotonicity": {"p": {**PAIRS, "target": 1.5}}}, "studies.monotonicity.p.target: 1.5 bits is below the"),
        ({"monotonicity": {"p": {**PAIRS, "variants": "gptg"}}}, "studies.monotonicity.p.variants: no variants are"),
        (
            {"peers": {"types": ["Q4_K"]}},
            "studies.peers.types.0: unknown type 'Q4_K'; llama.cpp's mixtures are IQ2_XXS",
        ),
        ({"peers": {"embeddings": ["Q3_K_M"]}}, "unknown type 'Q3_K_M'; there are Q4_0"),
        ({"peers": {"types": []}}, "studies.peers.types: "),
        ({"peers": {"quantizer": "/none"}}, "studies.peers.quantizer: '/none' is no program; check the path"),
        (
            {"peers": {"quantizer": "sh", "against": "evo"}},
            "studies.peers.against: no search is named 'evo': there are: uniform, evopress",
        ),
        (
            {"monotonicity": {"p": {**PAIRS, "tokens": 9999}}},
            "studies.monotonicity.p.tokens and confirm_tokens take",
        ),
    ],
)
def test_refusals_name_the_setting(studies: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(studies)
    assert any(line.startswith(message) or message in line for line in str(error.value).splitlines()), error.value


def test_problems_of_studies_and_of_searches_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        load({"monotonicity": {"p": {**PAIRS, "target": 9}}}, searches={"uniform": {"target": 9}})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "searches.uniform.target",
        "studies.monotonicity.p.target",
    ]


def test_a_search_may_not_have_the_name_of_a_study_of_peers() -> None:
    taken = {"strategy": "uniform", "variants": "gptq", "target": 3}
    with pytest.raises(ConfigError, match=r"^searches\.peers-Q4_0: the name is taken by studies\.peers"):
        load({"peers": {"quantizer": "sh", "types": ["Q4_0"]}}, searches={"peers-Q4_0": taken})


def test_null_removes_a_study() -> None:
    settings = load({"monotonicity": {"p": None}, "convergence": None})
    assert reported_studies(settings).model_dump() == {
        "groups": {},
        "convergence": False,
        "monotonicity": (),
        "peers": False,
    }
    assert list(studied_slices(settings, None)) == []


def test_the_package_leaves_the_section_alone() -> None:
    """So that settings with studies can be planned without the code of the studies."""
    written = {"anything": [1, 2]}
    assert Settings.load(lay_over(DEFAULT, {"studies": written})).studies == written


def test_generated_files_are_up_to_date() -> None:
    advice = "run `python workflow/reference.py`"
    readme = (REPOSITORY / "config/README.md").read_text()
    assert (REPOSITORY / "config/schema.json").read_text() == schema(StudiedSettings), advice
    assert updated_readme(readme, StudiedSettings) == readme, advice
    assert (REPOSITORY / "docs/artifacts.md").read_text() == artifacts(), advice
    assert {name for name, value in vars(tables).items() if isinstance(value, pa.Schema)} == set(TABLES)
    assert [row.path for row in rows(StudiedSettings) if not row.description] == []


def test_text_too_short_or_too_few_sequences_are_refused() -> None:
    study = MonotonicitySettings(variants="v", target=3, tokens=100, confirm_tokens=64)
    with pytest.raises(ValueError, match=r"take 13 \+ 8 sequences, but the search text has 20"):
        require_text(study, 20, 8)
    assert require_text(study, 21, 8) == (13, 8)
    with pytest.raises(ValueError, match="tokens: 100 tokens are one sequence; ask for at least 129"):
        require_text(study, 100, 128)
    with pytest.raises(ValueError, match=r"confirm_tokens: 64 tokens are 4 sequences.*at least 128"):
        require_text(study, 100, 16)
