"""Settings of texts."""

import pytest

from evopress.config.base import parse_section
from evopress.config.data import C4, DataSettings, FileText, FineWebEdu, HubText, PythonDocs, WikiText2
from evopress.data.held_out import leaks
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


def leaked(held_out, used):
    data = DataSettings(calibration=used, search=PythonDocs(), evaluation={"x": held_out})
    return leaks(data)


def test_the_same_file_by_another_way_is_a_leak(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the same words")
    (texts / "b.txt").write_text("other words")
    (tmp_path / "copy.txt").write_text("the same words")
    (tmp_path / "link.txt").symlink_to(texts / "b.txt")
    (tmp_path / "other.txt").write_text("the same wordz")
    folder, pattern = FileText(path=str(texts)), FileText(path=str(texts / "a*.txt"))
    single = {name: FileText(path=str(tmp_path / name)) for name in ("copy.txt", "link.txt", "other.txt")}
    for held_out, used in (
        (FileText(path=str(texts / "a.txt")), folder),
        (folder, pattern),
        (single["link.txt"], folder),
        (pattern, FileText(path=str(texts / "*.txt"))),
    ):
        (told,) = leaked(held_out, used)
        assert told.startswith("data.evaluation.x reads the same text as data.calibration (")
        assert leaked(used, held_out)
    (told,) = leaked(single["copy.txt"], folder)
    assert "copy.txt is a copy of" in told
    assert not leaked(single["other.txt"], folder) and not leaked(single["link.txt"], pattern)
    missing = FileText(path=str(tmp_path / "missing"))
    assert leaked(missing, missing) and not leaked(missing, folder)


@pytest.mark.parametrize(
    ("held_out", "used", "leak"),
    [
        (HubText(id="allenai/c4", name="en", split="validation"), C4(tokens=4096), False),
        (HubText(id="allenai/c4", name="en", split="train"), C4(tokens=4096), True),
        (C4(), HubText(id="allenai/C4", name="en", split="validation[:5%]"), True),
        (WikiText2(), WikiText2(), False),
        (WikiText2(), HubText(id="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train+test"), True),
        (WikiText2(), HubText(id="Salesforce/wikitext", name="wikitext-103-raw-v1", split="test"), False),
        (FineWebEdu(tokens=4096), FineWebEdu(tokens=4096), False),
        (FineWebEdu(tokens=4096), HubText(id="HuggingFaceFW/fineweb-edu", name="sample-10BT"), True),
        (HubText(id="x/y", split="train[90%:]"), HubText(id="x/y", split="train[:90%]"), False),
        (HubText(id="x/y", name="default", seed=3), HubText(id="x/y", revision="abc"), True),
    ],
)
def test_the_same_split_of_the_hub_is_a_leak(held_out, used, leak):
    assert bool(leaked(held_out, used)) == leak
