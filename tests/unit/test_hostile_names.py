"""Names that want to be paths, shell lines, markup or line breaks: refused, or harmless."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape as html_escape
from pydantic import TypeAdapter, ValidationError

from evopress.artifacts.paths import Run
from evopress.config.base import Name, to_yaml, unusable_texts
from evopress.config.model import FolderModel
from evopress.export.card import header
from evopress.export.card_sections import escape, fenced, markdown_table
from evopress.report.sections import environment as _environment
from evopress.util.errors import ConfigError
from evopress.workflow.files import model_files
from evopress.workflow.settings import Settings

NAME = TypeAdapter(Name)
HOSTILE = [
    "..", ".", "", "a/b", "../a", "/etc", "a\\b",
    "a\nb", "a\n", "a b", "a;b", "$(a)", "`a`", "a&b", "a|b", "a'b", 'a"b',
    "{a}", "<a>", "~", "-a", "ü", "a\u202eb", "a\0b", "a" * 65, "*", "%s", "#", "\ud800", "\uff41",
]  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    text = {"source": "python_docs", "tokens": 64, "sequence_length": 32}
    return {
        "complete": True,
        "name": "run",
        "model": {"source": "hub", "id": "a/b", "blocks": 2},
        "data": {"calibration": text, "search": text, "evaluation": {"held": text}},
        "variants": {"gptq": {"method": "gptq"}},
        "searches": {"one": {"strategy": "uniform", "variants": "gptq", "target": 3}},
        **changes,
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_wherever_a_name_becomes_a_path(name: str) -> None:
    plain = settings()
    Settings.load(plain)
    places = [
        settings(name=name),
        settings(variants={"gptq": plain["variants"]["gptq"], name: plain["variants"]["gptq"]}),
        settings(searches={name: plain["searches"]["one"]}),
        settings(data={**plain["data"], "evaluation": {name: plain["data"]["search"]}}),
    ]
    for place in places:
        with pytest.raises(ConfigError):
            Settings.load(place)


@given(st.text(max_size=70) | st.text("ab0._-/ \n", max_size=70))
def test_a_name_that_is_accepted_is_one_plain_word_of_a_path_and_of_a_shell_line(name: str) -> None:
    try:
        NAME.validate_python(name)
    except ValidationError:
        return
    assert shlex.quote(name) == name
    run = Run(Path("/results") / name)
    assert run.root.parent == Path("/results")
    for path, depth in (
        (run.tokens(name), 1),
        (run.variant_table(name, 0), 2),
        (run.configuration(name), 2),
        (run.export(name, "archive"), 2),
        (run.export_manifest(name, "archive"), 2),
        (run.perplexity(name), 2),
        (run.dense_hidden(name), 2),
    ):
        assert len(path.relative_to(run.root).parts) == depth + 1
        assert ".." not in path.parts


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model": {"path": "a\0b"}}, r"model\.path: 'a\\x00b' holds a character"),
        ({"tasks": ["x", "\udc80"]}, r"tasks\.1: '\\udc80' holds a character"),
        ({"x\0": 1}, "settings: 'x\\\\x00' holds"),
        ({"path": "x" * 5000}, "path: 5000 characters"),
    ],
)
def test_texts_that_no_path_can_hold_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Settings.load(settings(**values))


def test_settings_that_hold_themselves_are_refused() -> None:
    values = yaml.safe_load("a: &a [*a]")
    assert any("nested too deeply" in line for line in unusable_texts(values))


@pytest.mark.parametrize("name", ["a{b}.json", "a<results>.json", "a\nb.json"])
def test_files_whose_names_snakemake_would_read_as_patterns_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="Snakemake cannot take"):
        model_files(FolderModel(path=str(tmp_path)))


MARKUP = "<img src=x onerror=alert(1)> & \"'|`*_[x](javascript:y)\n# x"


def test_markup_in_names_is_text_in_the_report() -> None:
    page = _environment().from_string("<td title='{{ name }}'>{{ name }}</td>").render(name=MARKUP)
    assert page == f"<td title='{html_escape(MARKUP)}'>{html_escape(MARKUP)}</td>"


def test_markup_in_names_is_text_in_the_card() -> None:
    shown = escape(MARKUP)
    assert "\n" not in shown and r"\<img" in shown and r"\[x\]" in shown and r"\|" in shown
    assert len(markdown_table(["a"], [[MARKUP]]).splitlines()) == 3


@given(st.text("`~\n a<", max_size=60))
def test_no_setting_ends_the_block_of_code_that_shows_it(text: str) -> None:
    lines = fenced(to_yaml({"path": text}), "yaml").splitlines()
    fence = lines[-1]
    assert set(fence) == {"`"} and lines[0] == fence + "yaml"
    assert not any(line.strip().startswith(fence) for line in lines[1:-1])


@given(st.text("-\n: a'\"", max_size=40))
def test_no_license_text_ends_the_header_of_the_card(text: str) -> None:
    from evopress.artifacts.model_facts import ModelFacts

    lines = header(ModelFacts("name", "origin", None, {"license": text})).split("\n")
    assert lines[0] == lines[-1] == "---" and "---" not in lines[1:-1]
    assert yaml.safe_load("\n".join(lines[1:-1]))["license"] == text
