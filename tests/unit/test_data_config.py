"""Settings of texts."""

import pytest

from evopress.config.base import parse_section
from evopress.config.data import DataSettings, FileText, FineWebEdu, HubText, PythonDocs, leaks
from evopress.util.errors import ConfigError


def test_tokens_are_whole_sequences():
    with pytest.raises(
        ConfigError, match=r"tokens: 5000 is not a multiple of sequence_length \(2048\): use 4096 or 6144"
    ):
        parse_section(PythonDocs, {"tokens": 5000})
    with pytest.raises(ConfigError, match=r"tokens: 100 is not a multiple of sequence_length \(512\): use 512$"):
        parse_section(PythonDocs, {"tokens": 100, "sequence_length": 512})
    assert parse_section(PythonDocs, {"tokens": 4096}).tokens == 4096


def test_fineweb_edu_is_never_taken_whole():
    with pytest.raises(ConfigError, match="10 billion tokens"):
        parse_section(FineWebEdu, {})


def test_unknown_source_and_key_name_the_place():
    data = {"calibration": {"source": "fineweb"}, "search": {"source": "c4"}, "evaluation": {"x": {"source": "c4"}}}
    with pytest.raises(ConfigError, match=r"data\.calibration.*fineweb"):
        parse_section(DataSettings, data, "data")
    data["calibration"] = {"source": "c4", "token": 4096}
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        parse_section(DataSettings, data, "data")


def test_only_text_that_two_roles_share_is_a_leak(tmp_path):
    file, hub = FileText(path=str(tmp_path / "a.txt")), HubText(id="x/y", tokens=4096)
    evaluation = {
        "own": PythonDocs(),
        "file": FileText(path=f"{tmp_path}/b/../a.txt", tokens=2048),
        "hub": HubText(id="x/y"),
    }
    found = leaks(DataSettings(calibration=file, search=hub, evaluation=evaluation))
    assert len(found) == 2
    assert found[0].startswith("data.evaluation.file reads the same text as data.calibration")
    assert found[1].startswith("data.evaluation.hub reads the same text as data.search")
    test = {"hub": HubText(id="x/y", split="test")}
    assert not leaks(DataSettings(calibration=PythonDocs(), search=hub, evaluation={**test, "docs": PythonDocs()}))
