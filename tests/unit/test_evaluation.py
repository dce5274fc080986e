"""Perplexity and divergence against plain formulas on the whole model, and lm-eval tasks without network."""

import json
import math
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from finished_run import FINGERPRINT, VOCABULARY, make_results, tiny_model, write_tokens

from evopress.artifacts.exports import file_digests, write_export_manifest
from evopress.artifacts.paths import HUGGINGFACE
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import PERPLEXITY, TASKS, read_table
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.evaluation import TaskSettings
from evopress.data.tokens import read_counted
from evopress.evaluation import perplexity
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.evaluation.runtime import Text, compare, require_close
from evopress.evaluation.tasks import check_names, evaluate_tasks, task_rows, write_overlays
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.util.errors import ArtifactError, ConfigError, ModelError

COMPUTE = ComputeSettings(device="cpu")


@pytest.fixture
def results(tmp_path):
    results = make_results(tmp_path)
    write_tokens(results, "novels")
    write_tokens(results, "letters", sequences=2, length=7, seed=1)
    return results


def _stitch(results, search, model):
    """Put a finished model where the export stage would."""
    folder = results.export(search, HUGGINGFACE)
    shutil.copytree(results.model, folder)
    model.save_pretrained(folder)
    write_export_manifest(results, search, HUGGINGFACE, file_digests(folder), Provenance("export", "{}", FINGERPRINT))


def _plain(model, teacher, tokens):
    """Perplexity, mean KL and share of equal top tokens from full logits in float64, by sequence and as a whole."""
    with torch.no_grad():
        log_q = model(tokens).logits[:, :-1].double().log_softmax(-1)
        log_p = teacher(tokens).logits[:, :-1].double().log_softmax(-1)
    nll = -log_q.gather(-1, tokens[:, 1:, None]).mean()
    kl, same = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1), (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1)
    return nll.exp().item(), kl, same


@pytest.mark.parametrize("small_chunks", [False, True])
def test_perplexity_and_kl_equal_those_of_full_logits(results, small_chunks, monkeypatch):
    if small_chunks:  # chunks of logits that do not fall on the ends of windows, one sequence at a time
        monkeypatch.setattr(perplexity, "LOGITS", 5 * VOCABULARY)
        monkeypatch.setattr(perplexity, "RUN_TOKENS", 1)
    dense, other = tiny_model(), tiny_model(seed=0)
    for parameter in other.model.layers.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    _stitch(results, "evo", other)
    datasets = {"novels": write_tokens(results, "novels"), "letters": write_tokens(results, "letters", 2, 7, 1)}
    evaluate_perplexity(StageContext(results, COMPUTE), "dense", list(datasets))
    evaluate_perplexity(StageContext(results, COMPUTE), "evo", list(datasets))
    for search, model in (("dense", dense), ("evo", other)):
        table = read_table(results.perplexity(search), PERPLEXITY).set_index("dataset")
        assert list(table.index) == list(datasets) and set(table["search"]) == {search}
        for dataset, tokens in datasets.items():
            expected = _plain(model, dense, tokens)
            assert table.loc[dataset, "perplexity"] == pytest.approx(expected[0], rel=1e-5)
            for name, by_sequence in zip(("kl", "agreement"), expected[1:], strict=True):
                assert table.loc[dataset, name] == pytest.approx(by_sequence.mean().item(), rel=1e-4, abs=1e-12)
                if search == "dense":  # compared with itself: nothing is estimated
                    assert math.isnan(table.loc[dataset, f"{name}_stderr"])
                else:  # all sequences are of one length, so this is the plain error of a mean of means
                    error = by_sequence.std().item() / math.sqrt(len(by_sequence))
                    assert table.loc[dataset, f"{name}_stderr"] == pytest.approx(error, rel=1e-3)
            assert table.loc[dataset, "tokens"] == tokens[:, 1:].numel()


def test_start_tokens_are_no_targets(results):
    """What a document's last token predicts is compared with nothing: not in perplexity, not in KL."""
    starts = [[0, 5], [], [11]]
    tokens = write_tokens(results, "novels", starts=starts)
    other = tiny_model()
    for parameter in other.model.layers.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    _stitch(results, "evo", other)
    for search in ("dense", "evo"):
        evaluate_perplexity(StageContext(results, COMPUTE), search, ["novels"])
    row = read_table(results.perplexity("evo"), PERPLEXITY).iloc[0]
    with torch.no_grad():
        log_q, log_p = (model(tokens).logits.double().log_softmax(-1) for model in (other, tiny_model()))
    kept = [(s, t) for s in range(3) for t in range(11) if t + 1 not in starts[s]]
    nll = -sum(float(log_q[s, t, tokens[s, t + 1]]) for s, t in kept) / len(kept)
    kl = sum(float((log_p[s, t].exp() * (log_p[s, t] - log_q[s, t])).sum()) for s, t in kept) / len(kept)
    same = [int(log_p[s, t].argmax()) == int(log_q[s, t].argmax()) for s, t in kept]
    assert row["agreement"] == pytest.approx(sum(same) / len(same)) and 0 < sum(same) < len(same)
    assert row["tokens"] == len(kept) == 3 * 11 - 2
    assert row["perplexity"] == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-5)
    assert row["kl"] == pytest.approx(kl, rel=1e-4)


def test_the_dense_model_in_disguise_has_no_divergence_at_all(results):
    _stitch(results, "same", tiny_model())
    for search in ("dense", "same"):
        evaluate_perplexity(StageContext(results, COMPUTE), search, ["novels"])
    dense, same = (read_table(results.perplexity(search), PERPLEXITY) for search in ("dense", "same"))
    assert same["kl"].tolist() == [0.0] and same["agreement"].tolist() == [1.0]
    assert same["perplexity"].tolist() == dense["perplexity"].tolist()


def test_dense_hidden_states_must_come_first_and_from_the_same_tokens(results):
    _stitch(results, "evo", tiny_model())
    with pytest.raises(ArtifactError, match=r"hidden_novels\.json: missing"):
        evaluate_perplexity(StageContext(results, COMPUTE), "evo", ["novels"])
    evaluate_perplexity(StageContext(results, COMPUTE), "dense", ["novels"])
    write_tokens(results, "novels", seed=9)
    with pytest.raises(ArtifactError, match="was made from other tokens"):
        evaluate_perplexity(StageContext(results, COMPUTE), "evo", ["novels"])
    assert not results.perplexity("evo").exists()


def test_nan_weights_are_an_error_that_names_the_model(results):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    _stitch(results, "evo", model)
    evaluate_perplexity(StageContext(results, COMPUTE), "dense", ["novels"])
    with pytest.raises(ModelError, match=r"exports/evo/huggingface: gives NaN on novels"):
        evaluate_perplexity(StageContext(results, COMPUTE), "evo", ["novels"])


def test_a_model_of_another_origin_is_refused(results):
    evaluate_perplexity(StageContext(results, COMPUTE), "dense", ["novels"])
    _stitch(results, "evo", tiny_model())
    results.model_manifest.write_text(json.dumps({"fingerprint": "e" * 64}))
    for search in ("dense", "evo"):
        with pytest.raises(ArtifactError, match="was made for another model"):
            evaluate_perplexity(StageContext(results, COMPUTE), search, ["novels"])


def test_the_runtime_is_compared_at_the_tokens_that_count(results):
    starts = [[0, 5], [], [11]]
    tokens = write_tokens(results, "novels", starts=starts)
    plain = tiny_model()
    with torch.no_grad():
        own = plain(tokens).logits
    theirs = own + 0.3 * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    model = BlockwiseModel.from_folder(results.model, torch.device("cpu"), torch.float32)
    text = Text("novels", tokens, perplexity.predicted(read_counted(results, "novels")))
    hidden = final_hidden(model, tokens, 8, "")
    kl, own_nll, their_nll = compare(model, hidden, text, iter(theirs.flatten(0, 1).split([5, 1, 20, 10])))
    log_p, log_q = own.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kept = [(s, t) for s in range(3) for t in range(11) if t + 1 not in starts[s]]
    assert kl == pytest.approx(
        sum(float((log_p[s, t].exp() * (log_p[s, t] - log_q[s, t])).sum()) for s, t in kept) / len(kept), rel=1e-4
    )
    for found, log in ((own_nll, log_p), (their_nll, log_q)):
        expected = -sum(float(log[s, t, tokens[s, t + 1]]) for s, t in kept) / len(kept)
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ModelError, match="gives 63 logits per token and the model 64"):
        compare(model, hidden, text, iter([theirs[0, :, 1:]]))


@pytest.mark.parametrize(("kl", "close"), [(0.0, True), (0.05, True), (0.051, False), (float("nan"), False)])
def test_a_runtime_that_computes_something_else_is_an_error(kl, close):
    with nullcontext() if close else pytest.raises(ModelError, match=r"a/b\.gguf: its distribution on novels"):
        require_close(Path("a/b.gguf"), "novels", kl, 0.05)


QUESTIONS = [
    {"question": f"w{number + 2} w{number + 30}", "choices": ["w5", "w6", "w7"], "answer": number % 3}
    for number in range(6)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(TASK.format(name="quiz"))
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return folder


def _plain_accuracy(model):
    """Share of questions whose answer has the highest logit after the question (word wN is token N)."""
    right = 0
    for row in QUESTIONS:
        question = torch.tensor([[int(word[1:]) for word in row["question"].split()]])
        choices = torch.tensor([int(choice[1:]) for choice in row["choices"]])
        with torch.no_grad():
            right += int(model(question).logits[0, -1][choices].argmax()) == row["answer"]
    return right / len(QUESTIONS)


def test_a_local_task_runs_without_network_and_its_data_lie_beside_its_yaml(results, tasks, tmp_path, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    settings = TaskSettings(names=("quiz",), include_path=str(tasks), batch_size=4)
    evaluate_tasks(StageContext(results, COMPUTE), "dense", settings)
    table = read_table(results.tasks("dense"), TASKS)
    assert table[["search", "task", "metric", "filter", "documents"]].to_numpy().tolist() == [
        ["dense", "quiz", "acc", "none", 6]
    ]
    assert table["value"].tolist() == [pytest.approx(_plain_accuracy(tiny_model()))]
    written = json.loads(results.tasks_json("dense").read_text())
    assert written["results"]["quiz"]["acc,none"] == table["value"][0] and "samples" not in written


def test_limit_and_standard_error_reach_the_table(results, tasks):
    settings = TaskSettings(names=("quiz",), include_path=str(tasks), limit=4)
    evaluate_tasks(StageContext(results, COMPUTE), "dense", settings)
    table = read_table(results.tasks("dense"), TASKS)
    share = table["value"][0]
    assert table["documents"].tolist() == [4]
    assert table["stderr"][0] == pytest.approx((share * (1 - share) / 3) ** 0.5)


def test_no_tasks_is_an_empty_table_and_an_empty_object(results):
    evaluate_tasks(StageContext(results, COMPUTE), "dense", TaskSettings())
    assert read_table(results.tasks("dense"), TASKS).empty
    assert json.loads(results.tasks_json("dense").read_text()) == {}


def test_an_unknown_task_is_an_error_that_offers_near_names():
    with pytest.raises(
        ConfigError, match=r"evaluation\.tasks\.names: unknown task 'helaswag': did you mean 'hellaswag'"
    ):
        check_names(["arc_easy", "helaswag"], ["hellaswag", "arc_easy", "piqa"])
    with pytest.raises(ConfigError, match=r"unknown task 'zzz': see"):
        check_names(["zzz"], ["hellaswag"])


def test_a_missing_folder_of_tasks_is_an_error(results, tmp_path):
    settings = TaskSettings(names=("quiz",), include_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"evaluation\.tasks\.include_path: .*nowhere' is not a folder"):
        evaluate_tasks(StageContext(results, COMPUTE), "dense", settings)


def test_overlays_leave_functions_hub_data_and_absolute_paths_alone(tmp_path):
    folder, overlay = tmp_path / "tasks", tmp_path / "overlay"
    folder.mkdir()
    overlay.mkdir()
    (folder / "a.yaml").write_text(
        "task: a\ndataset_path: csv\ndoc_to_text: !function code.run\n"
        "dataset_kwargs: {sep: ';', data_files: {test: [a.csv, /data/b.csv], train: 'https://x/c.csv'}}\n"
    )
    (folder / "hub.yaml").write_text("task: hub\ndataset_path: someone/set\ndataset_kwargs: {data_files: x.json}\n")
    (folder / "group.yaml").write_text("group: g\ntask: [a, hub]\n")
    (folder / "broken.yaml").write_text("task: [\n")
    assert write_overlays(folder, overlay) == 1
    assert yaml.safe_load((overlay / "0.yaml").read_text()) == {
        "include": str(folder / "a.yaml"),
        "dataset_kwargs": {
            "sep": ";",
            "data_files": {"test": [str(folder / "a.csv"), "/data/b.csv"], "train": "https://x/c.csv"},
        },
    }


def test_rows_of_tasks_groups_and_filters():
    outcome = {
        "results": {
            "t": {"alias": "t", "sample_len": 9, "em,strict": 0.5, "em_stderr,strict": 0.1, "em,loose": 0.75},
        },
        "groups": {"g": {"alias": "g", "sample_len": 9, "acc,none": 0.25, "acc_stderr,none": "N/A"}},
        "n-samples": {"t": {"original": 20, "effective": 10}},
    }
    rows = task_rows(outcome, "evo").set_index(["task", "metric", "filter"])
    assert rows.loc[("t", "em", "strict"), ["value", "stderr", "documents"]].tolist() == [0.5, 0.1, 10]
    assert rows.loc[("t", "em", "loose"), "value"] == 0.75 and pd.isna(rows.loc[("t", "em", "loose"), "stderr"])
    assert rows.loc[("g", "acc", "none"), ["value", "documents"]].tolist() == [0.25, 9]


def test_the_task_that_ships_is_well_formed():
    folder = Path(__file__).parents[2] / "config" / "tasks"
    task = yaml.safe_load((folder / "everyday.yaml").read_text())
    rows = [json.loads(line) for line in (folder / "everyday.jsonl").read_text().splitlines()]
    assert (folder / task["dataset_kwargs"]["data_files"]["test"]).name == "everyday.jsonl"
    assert len({row["question"] for row in rows}) == len(rows) == 40
    assert all(len(set(row["choices"])) == 4 for row in rows)
    # A model that always prefers one place must score no better than chance.
    assert [sum(row["answer"] == place for row in rows) for place in range(4)] == [10, 10, 10, 10]
