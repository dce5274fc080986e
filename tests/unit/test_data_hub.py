"""The hub's data sets, loaded through `datasets` from local folders in the hub's layout."""

import gzip
import json

import datasets
import pandas as pd
import pytest

from evopress.config.data import C4, FineWebEdu, HubText, WikiText2
from evopress.data import hub
from evopress.data.sources import C4_DOCUMENTS, dealt_role, open_corpus
from evopress.util.errors import DataError

WIKITEXT_CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files: [{split: test, path: wikitext-103-raw-v1/test-*}]
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
---
"""
C4_CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}
- config_name: realnewslike
  data_files: [{split: train, path: realnewslike/*.json.gz}]
dataset_info:
- config_name: en
  features: [{name: text, dtype: string}, {name: timestamp, dtype: string}, {name: url, dtype: string}]
  splits:
  - {name: train, num_bytes: 828589180707, num_examples: 364868892}
  - {name: validation, num_bytes: 825767266, num_examples: 364608}
---
"""
FINEWEB_CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""
WIKITEXT_ROWS = ["", " = Title = \n", "", " First paragraph . \n", " Second . \n", ""]


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


def json_gz(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "x"}) + "\n")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that stands for the hub: data sets under their ids, cards and file names as on the hub."""
    monkeypatch.setattr(hub, "location", lambda id: str(tmp_path / "hub" / id))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "hub" / "Salesforce" / "wikitext"
    parquet(root / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", {"text": WIKITEXT_ROWS})
    parquet(root / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet", {"text": ["", " = Train = \n"]})
    parquet(root / "wikitext-103-raw-v1" / "test-00000-of-00001.parquet", {"text": ["wrong configuration"]})
    (root / "README.md").write_text(WIKITEXT_CARD)
    root = tmp_path / "hub" / "allenai" / "c4"
    json_gz(root / "en" / "c4-validation.00000-of-00008.json.gz", [f"held out {i}" for i in range(C4_DOCUMENTS + 50)])
    json_gz(root / "en" / "c4-validation.00001-of-00008.json.gz", ["wrong shard"])
    json_gz(root / "en" / "c4-train.00000-of-01024.json.gz", [f"train {i}" for i in range(30)])
    json_gz(root / "en" / "c4-train.00001-of-01024.json.gz", ["wrong shard"])
    json_gz(root / "realnewslike" / "c4-train.00000-of-00512.json.gz", ["wrong configuration"])
    (root / "README.md").write_text(C4_CARD)
    root = tmp_path / "hub" / "HuggingFaceFW" / "fineweb-edu"
    rows = [{"text": f"Lesson {i}.", "id": f"<urn:uuid:{i}>", "score": 3.5} for i in range(200)]
    parquet(root / "sample" / "10BT" / "000_00000.parquet", rows[:150])
    parquet(root / "sample" / "10BT" / "001_00000.parquet", rows[150:])
    parquet(root / "data" / "CC-MAIN-2024-10" / "000_00000.parquet", [{"text": "wrong", "id": "x", "score": 0.0}])
    (root / "README.md").write_text(FINEWEB_CARD)
    return tmp_path / "hub"


def test_wikitext2_is_one_text_joined_by_blank_lines(mirror):
    (document,) = open_corpus(WikiText2(), "evaluation").documents
    assert document == ("wikitext2/test", "\n\n".join(WIKITEXT_ROWS))
    for role in ("calibration", "search"):
        (document,) = open_corpus(WikiText2(), role).documents
        assert document == ("wikitext2/train", "\n\n = Train = \n")


def test_c4_evaluates_on_the_first_documents_joined_by_spaces(mirror):
    corpus = open_corpus(C4(), "evaluation")
    (document,) = corpus.documents
    assert document == ("c4/validation", " ".join(f"held out {i}" for i in range(1100)))
    assert corpus.usual_windows == 256 and corpus.order == "text"


def test_c4_calibrates_on_documents_of_the_first_training_shard(mirror):
    corpus = open_corpus(C4(), "calibration")
    assert list(corpus.documents) == [(f"c4/train:{i}", f"train {i}") for i in range(30)]
    assert corpus.usual_windows is None and corpus.order == "stream"


def test_fineweb_edu_deals_every_document_to_one_role(mirror):
    dealt = {
        role: list(open_corpus(FineWebEdu(tokens=2048), role).documents)
        for role in ("calibration", "search", "evaluation")
    }
    assert sorted(d.name for docs in dealt.values() for d in docs) == sorted(
        f"fineweb_edu/<urn:uuid:{i}>" for i in range(200)
    )
    assert all(dealt_role(d.name.removeprefix("fineweb_edu/")) == role for role, docs in dealt.items() for d in docs)
    assert len(dealt["calibration"]) > 50 and len(dealt["search"]) > 50 and len(dealt["evaluation"]) > 20


@pytest.mark.parametrize("streaming", [True, False])
def test_any_data_set_by_name_split_and_column(mirror, streaming):
    parquet(mirror / "some" / "set" / "data" / "validation-00000.parquet", {"body": ["a", None, "b"], "n": [1, 2, 3]})
    settings = HubText(id="some/set", split="validation", column="body", streaming=streaming)
    assert list(open_corpus(settings, "search").documents) == [
        ("some/set/validation:0", "a"),
        ("some/set/validation:1", ""),
        ("some/set/validation:2", "b"),
    ]


def test_what_does_not_exist_is_named_at_once(mirror):
    def read(**settings):
        return list(open_corpus(HubText(**settings), "search").documents)

    with pytest.raises(DataError, match=r"allenai/c4 en nowhere: cannot be read"):
        read(id="allenai/c4", name="en", split="nowhere")
    with pytest.raises(DataError, match=r"HuggingFaceFW/fineweb-edu sample-9BT train: cannot be read.*sample-10BT"):
        read(id="HuggingFaceFW/fineweb-edu", name="sample-9BT")
    with pytest.raises(DataError, match=r"nobody/nothing train: cannot be read"):
        read(id="nobody/nothing")
    with pytest.raises(DataError, match="no column 'content', but 'text', 'id', 'score'"):
        read(id="HuggingFaceFW/fineweb-edu", name="sample-10BT", column="content")


def test_the_named_data_sets_are_pinned_to_commits():
    for split in (hub.wikitext2("test"), hub.c4_train(), hub.c4_validation(), hub.fineweb_edu()):
        assert split.revision is not None and len(split.revision) == 40 and int(split.revision, 16)


def failing(failures, error, rows=5, at=3):
    """A stream of numbered rows that breaks ``failures`` times at row ``at``."""
    left = [failures]

    def open_rows(split):
        for number in range(rows):
            if number == at and left[0]:
                left[0] -= 1
                raise error
            yield {"n": number}

    return open_rows


def test_a_lost_connection_goes_on_at_the_same_row():
    waited = []
    failures = 1 + len(hub.WAITS)  # after the first it is opened again at once
    rows = hub.read_rows(hub.fineweb_edu(), failing(failures, TimeoutError("slow")), waited.append)
    assert [row["n"] for row in rows] == [0, 1, 2, 3, 4]
    assert tuple(waited) == hub.WAITS


def test_a_hub_that_stays_away_is_an_error_that_names_the_data_set():
    waited = []
    rows = hub.read_rows(hub.fineweb_edu(), failing(99, ConnectionError("no route")), waited.append)
    with pytest.raises(
        DataError, match=r"fineweb-edu sample-10BT train: the hub did not answer in 3 attempts.*no route"
    ):
        list(rows)
    assert tuple(waited) == hub.WAITS


def test_other_errors_are_not_tried_again():
    waited = []
    with pytest.raises(DataError, match="wikitext-2-raw-v1 test: cannot be read: bad split"):
        list(hub.read_rows(hub.wikitext2("test"), failing(1, ValueError("bad split")), waited.append))
    assert not waited


def test_a_cause_decides_whether_an_error_may_go_away():
    def caused(cause):
        error = RuntimeError("generation failed")
        error.__cause__ = cause
        return error

    assert hub.is_transient(caused(TimeoutError()))
    assert not hub.is_transient(caused(ValueError()))
    assert not hub.is_transient(None)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_sample_begins_anywhere_in_a_data_set_of_many_files(mirror, streaming):
    for number in range(6):
        rows = {"text": [f"{number}-{row}" for row in range(4)]}
        parquet(mirror / "many" / "files" / "data" / f"train-{number:05d}-of-00006.parquet", rows)

    def read(role, **settings):
        text = HubText(id="many/files", streaming=streaming, **settings)
        return [document.text for document in open_corpus(text, role).documents]

    everything = [f"{number}-{row}" for number in range(6) for row in range(4)]
    orders = [read("search", tokens=2048, seed=seed) for seed in range(6)]
    assert all(sorted(order) == everything for order in orders) and len({order[0] for order in orders}) > 1
    assert orders[0] == read("search", tokens=2048, seed=0)
    assert read("evaluation", tokens=2048, seed=3) == read("search", seed=3) == everything


@pytest.mark.parametrize("text", [C4(tokens=2048), WikiText2(), HubText(id="ours/texts", streaming=False)], ids=str)
def test_a_forbidden_network_is_told_as_such(text, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match=r"not in the cache, and HF_HUB_OFFLINE forbids.* source: file") as told:
        next(iter(open_corpus(text, "calibration").documents))
    assert "check its id" not in str(told.value)
