"""Settings that README.md and config/README.md show are valid over the default."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from evopress.workflow.settings import Settings, lay_over, read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT = read_yaml(REPOSITORY / "config/config.yaml")


def examples(path: str) -> Iterator[tuple[str, str]]:
    """Indented blocks that are sections of settings."""
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, flags=re.MULTILINE):
        lines = re.sub(r"^ {4}", "", block, flags=re.MULTILINE).lstrip("\n")
        lines = re.split(r"^(?:\.venv|snakemake|vllm|llama)", lines, flags=re.MULTILINE)[0]  # commands that follow
        if re.match(r"(#.*\n)*(name|model|data|hessians|variants|searches|evaluation|compute):", lines):
            yield f"{path}: {lines.strip().splitlines()[0]} {lines.strip().splitlines()[-1].strip()}", lines


EXAMPLES = [*examples("README.md"), *examples("config/README.md")]


@pytest.mark.parametrize("text", [text for _, text in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_an_example_is_valid(text: str) -> None:
    Settings.load(lay_over(DEFAULT, yaml.safe_load(text)))


def test_there_are_some() -> None:
    assert len(EXAMPLES) > 5


def test_forms_of_a_size_take_each_others_place() -> None:
    for target in ({"fraction": 0.3}, {"bpw": 4.0}, {"bytes": "90 MB"}, {"bytes": "90 MB", "above_source": True}, 4.0):
        settings = Settings.load(lay_over(DEFAULT, {"searches": {"evopress": {"target": target}}}))
        found = settings.searches["evopress"].target
        assert str(found).startswith(
            {"fraction": "0.3", "bpw": "4", "bytes": "90 MB"}.get(next(iter(target)), "")
            if isinstance(target, dict)
            else "4.0"
        )
