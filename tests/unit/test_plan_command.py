"""`python -m evopress plan` on large models, and what it says of bad settings."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from large_models import SHAPES, write_settings

from evopress.artifacts.paths import Run
from evopress.cli.commands import main
from evopress.config.context import ComputeSettings
from evopress.evaluation.perplexity import LOGITS, RUN_TOKENS
from evopress.plan.searches import SearchWork, requests_of, search_work
from evopress.plan.shape import shape_of
from evopress.plan.stages import Stage, Stages, hessian_bytes
from evopress.plan.text import Rates, planned, stage_table
from evopress.search.engine.memory import ACTIVATION_WIDTH
from evopress.search.problem import problem_of
from evopress.util.device import working_dtype
from evopress.util.errors import ConfigError
from evopress.util.text import amount
from evopress.workflow.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[2]


def stages(settings, shape, tables, searches=None) -> list[Stage]:
    """Stages of a run on a device that works in the type of the model."""
    return list(Stages(settings, shape).all(tables, {}, searches or {}))


@pytest.mark.parametrize(
    ("size", "parameters", "kept"),
    [("7B", "6.74 G", ["streamed", "kept"]), ("70B", "70.6 G", ["streamed", "streamed"])],
)
def test_large_models_on_a_small_and_a_large_device(size, parameters, kept, tmp_path, capsys):
    path = write_settings(tmp_path, size)
    assert main(["plan", str(path), "--device-memory-gb", "24", "80"]) == 0
    printed = capsys.readouterr()
    lines, words = printed.out.splitlines(), " ".join(printed.out.split())
    assert printed.err == "" and f"LlamaForCausalLM: {parameters} parameters" in lines[0]
    assert re.findall(r"weights are (kept|streamed)", words) == kept
    hidden = SHAPES[size]["hidden_size"]
    assert words.count(f"those of the dense model, {amount(float(hidden * 2 * (1 << 19)), 'B')}") == 2
    assert any(line.startswith("total") and ">=" in line for line in lines)  # wikitext2 has no set length


@pytest.mark.parametrize(
    ("embedding", "largest"), [(False, 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)), (True, 128256 * 8192)]
)
def test_a_budget_that_a_search_would_refuse_is_told_beforehand(embedding, largest, tmp_path, capsys):
    """Outside of the blocks, and twice what is the largest: a block, or the embedding where it has levels."""
    variants = {"gptq": {"method": "gptq", "bits": [2, 3, 4], "group_size": 128, "embedding": embedding}}
    path = write_settings(tmp_path, "70B", compute={"memory_gb": 4}, variants=variants)
    assert main(["plan", str(path)]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("search q3 will be refused"))
    assert "compute.memory_gb: 4 is too little" in told
    enough = str(float(told.split()[-1]) + 0.05)  # rounded to three digits
    itemsize = working_dtype(torch.bfloat16, torch.device("cpu")).itemsize
    assert float(enough) == pytest.approx((2 * 128256 * 8192 + 2 * largest) * itemsize / 1e9, abs=0.2)
    (tmp_path / "enough").mkdir()
    path = write_settings(tmp_path / "enough", "70B", compute={"memory_gb": float(enough)}, variants=variants)
    assert main(["plan", str(path)]) == 0
    assert "refused" not in capsys.readouterr().out


def test_work_of_a_7b_model_by_hand(tmp_path):
    settings = load_settings([write_settings(tmp_path, "7B")])
    shape = shape_of(settings.model, Run(tmp_path))
    assert shape is not None
    variants = settings.variants["gptq"].table(shape.layers, shape.itemsize, "variants.gptq")
    search, text = settings.searches["q3"], settings.data.search
    problem = problem_of({"gptq": variants}, search.constraints("q3"))
    requests = requests_of(search, problem)
    small, large = (
        search_work(shape, problem, search, requests, text, ComputeSettings(memory_gb=0.9 * gigabytes))
        for gigabytes in (24, 80)
    )
    # 128 candidates in two steps pass in parts on the small device: each part begins at the first block.
    tokens = 128 * 2048 + 16 * 16384 + 5 * 131072
    assert small.a_round.candidate_tokens == large.a_round.candidate_tokens == tokens
    assert large.a_round.head_tokens == tokens + 2048 + 16384 + 131072 <= small.a_round.head_tokens
    share = large.a_round.share_of_block_work
    assert 0.7 < share <= small.a_round.share_of_block_work < 0.85
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    shorter = 2 * linear + 32 * 4 * 2048 * 4096  # the first step's 2,048 tokens are half a sequence
    per_token = 2 * linear + 32 * 4 * 4096 * 4096
    expected = share * tokens * per_token + large.a_round.head_tokens * 2 * 4096 * 32000
    assert shorter / per_token * expected < large.a_round.flops < 1.01 * expected
    # Everything is unpacked once in each pass, and the mutants' levels on top.
    assert small.a_round.unpacked_bytes > small.a_round.passes * linear * 2 > 2 * large.a_round.unpacked_bytes
    for work, gigabytes in ((small, 24), (large, 80)):
        assert work.memory_bytes < gigabytes * 1e9


def test_a_chain_of_compressed_blocks_keeps_no_hessians_and_runs_each_block_twice(tmp_path):
    dense = load_settings([write_settings(tmp_path, "7B", searches={})])
    chain = {"propagation": "sequential", "propagation_level": "3"}
    method = dense.variants["gptq"].model_copy(update=chain)
    chained = dense.model_copy(update={"variants": {"gptq": method}})
    shape = shape_of(dense.model, Run(tmp_path))
    assert shape is not None
    table = method.table(shape.layers, shape.itemsize, "variants.gptq")
    apart, together = (
        {stage.name: stage for stage in stages(settings, shape, {"gptq": table})} for settings in (dense, chained)
    )
    assert set(apart) - set(together) == {"hessians"}
    before, after, hessians = apart["variants gptq"], together["variants gptq"], apart["hessians"]
    assert after.jobs == before.jobs == 32 and after.disk == before.disk
    assert before.flops + hessians.flops < after.flops < before.flops + 2 * hessians.flops
    assert after.memory > before.memory


def test_embedding_and_head_are_a_job_of_their_own_with_its_memory(tmp_path):
    dense = load_settings([write_settings(tmp_path, "7B", searches={})])
    method = dense.variants["gptq"].model_copy(update={"embedding": True})
    chain = method.model_copy(update={"propagation": "sequential", "propagation_level": "3"})
    shape = shape_of(dense.model, Run(tmp_path))
    assert shape is not None
    plain, both, chained = (
        {
            stage.name: stage
            for stage in stages(
                dense.model_copy(update={"variants": {"gptq": made}}),
                shape,
                {"gptq": shape.table(made, "variants.gptq")},
            )
        }
        for made in (dense.variants["gptq"], method, chain)
    )
    assert set(both) - set(plain) == {"variants gptq, embedding"} == set(chained) - set(plain)
    assert both["variants gptq"] == plain["variants gptq"], "what blocks take is not moved"
    own, weights = both["variants gptq, embedding"], 32000 * 4096
    codes = 2 * weights * (2 + 3 + 4 + 5 + 6) / 8
    assert own.jobs == 1 and codes < own.disk < 1.1 * codes
    assert own.memory > own.disk + 8 * weights, "a dense weight and its copy in float32, and both with all variants"
    assert own.flops > 2 * 2 * 4096 * weights, "at least the energies of both"
    for hessians in (
        plain["hessians"],
        both["hessians"],
        chained["hessians"],
    ):  # that of the head's input is always made
        assert hessians.disk == hessian_bytes(shape.layers) + 4 * 4096**2


def test_a_polish_is_planned_without_embedding_and_head(tmp_path):
    search = {"strategy": "uniform", "variants": "gptq", "target": 3, "polish": "sequential"}
    settings = load_settings([write_settings(tmp_path, "7B", searches={"q3": search})])
    shape = shape_of(settings.model, Run(tmp_path))
    assert shape is not None
    method = settings.variants["gptq"]
    tables = [shape.table(made, "v") for made in (method, method.model_copy(update={"embedding": True}))]
    plain, both = (
        next(
            stage for stage in stages(settings, shape, {"gptq": table}, {"q3": SearchWork()}) if "polish" in stage.name
        )
        for table in tables
    )
    assert len(tables[0]) < len(tables[1]) and plain == both


def test_perplexity_is_planned_with_the_tokens_that_it_runs_at_once(tmp_path):
    text = {"source": "fineweb_edu", "tokens": 4096, "sequence_length": 2048}
    data = {"calibration": text, "search": text, "evaluation": {"held": text}}
    settings = load_settings([write_settings(tmp_path, "7B", searches={}, data=data)])
    shape = shape_of(settings.model, Run(tmp_path))
    assert shape is not None
    (found,) = (stage for stage in stages(settings, shape, {}) if stage.name == "perplexity")
    heads = 1 + bool(settings.searches)  # the dense model's beside that of a compressed one
    numbers = heads * shape.outside + (ACTIVATION_WIDTH * RUN_TOKENS + 2 * 4096) * shape.hidden_size
    logits = LOGITS * (2 * 2 + 8)
    assert found.memory == numbers * 2 + shape.block_bytes + logits and found.disk == 4096 * shape.hidden_size * 2


def test_time_follows_from_measured_rates_and_the_devices_alone(tmp_path, capsys):
    text = {"source": "fineweb_edu", "tokens": 1 << 16, "sequence_length": 4096}
    data = {"calibration": text, "search": text, "evaluation": {"held": text}}
    steps = {"offspring": 8, "survivors": [2, 1], "tokens": [4096, 16384]}
    search = {"strategy": "evolution", "variants": "gptq", "target": 3.0, **steps}
    path = write_settings(tmp_path, "7B", data=data, searches={"q3": search})
    rates = {"hessians": 3.6e13, "variants": 3.6e12, "search": 3.6e13, "perplexity": 3.6e13}
    (tmp_path / "check.json").write_text(json.dumps({"machine": {}, "rates": rates}))
    measured = Rates.read(tmp_path / "check.json")
    found = {stage.name: stage for stage in planned(load_settings([path]), Run(tmp_path / "run")).stages}
    variants = found["variants gptq"]
    assert measured.hours(variants, 1) == variants.flops / 3.6e12 / 3600 == 4 * measured.hours(variants, 4)
    assert measured.hours(variants, 1000) == measured.hours(variants, variants.jobs)
    assert measured.hours(found["search q3"], 8) == measured.hours(found["search q3"], 1), "it has one process"
    assert math.isnan(measured.hours(Stage("tasks", 1, work={"tasks": 1.0}), 1)), "of which nothing was measured"
    slow = Rates(rates, unpack=1.0, disk=1e9)
    for stage in (variants, found["search q3"]):
        working, disk = stage.flops / rates[stage.name.split()[0]], (stage.read + stage.disk) / 1e9
        assert slow.hours(stage, 1) == pytest.approx((max(working, stage.unpacked) + disk) / 3600)

    assert main(["plan", str(path), "--rates", str(tmp_path / "check.json"), "--devices", "4"]) == 0
    out = capsys.readouterr().out
    assert "hours" in out.splitlines()[2] and "on 4 devices" in out
    row = next(line for line in stage_table(list(found.values()), measured, 4).splitlines() if "variants" in line)
    assert row in out and row.split()[-1] == f"{measured.hours(variants, 4):.2f}"
    assert main(["plan", str(path)]) == 0
    assert "hours" not in capsys.readouterr().out.lower(), "without rates, nothing is said of time"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rates": {"search": "fast"}}', '{"rates": {"search": 0}}', '{"rates": 1}']
)
def test_rates_that_are_none_are_refused(text, tmp_path):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ConfigError, match=r"rates\.json: .*rate"):
        Rates.read(tmp_path / "rates.json")


def test_processes_of_a_search_have_a_share_each(tmp_path):
    found = {}
    for processes in (1, 4):
        (tmp_path / str(processes)).mkdir()
        compute = {"device": "cuda", "memory_gb": 72, "processes": processes}
        settings = load_settings([write_settings(tmp_path / str(processes), "7B", compute=compute)])
        made = planned(settings, Run(tmp_path / "run"))
        found[processes] = made.works["q3"], next(stage for stage in made.stages if stage.name == "search q3")
    (alone, stage), (first, stages_of_four) = found[1], found[4]
    assert (stage.jobs, stages_of_four.jobs) == (1, 4)
    assert first.whole.candidate_tokens == alone.whole.candidate_tokens
    assert 0.25 < first.whole.flops / alone.whole.flops < 0.4, "some prefixes are computed in two processes"
    assert stages_of_four.flops == 4 * first.whole.flops and stages_of_four.read > 2 * stage.read


def test_the_device_need_not_be_in_the_machine_that_plans(tmp_path, capsys):
    assert main(["plan", str(write_settings(tmp_path, "7B", compute={"device": "cuda:3", "memory_gb": 70}))]) == 0
    out = capsys.readouterr().out
    assert "kept" in out and "streamed" not in out


def test_overlays_lie_over_the_default_as_in_the_workflow(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("searches: {evopress: {generations: 7}}\n")
    second.write_text("name: mine\nsearches: {uniform: null}\n")
    settings = load_settings([first, second])
    assert settings.name == "mine" and list(settings.searches) == ["evopress"]
    assert settings.searches["evopress"].generations == 7 and settings.model.source == "pypi"


def test_a_wheel_that_is_not_there_yet_is_planned_as_far_as_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    overlay = tmp_path / "a.yaml"
    steps = "offspring: 16, survivors: [4, 1], tokens: [512, 2048]"
    overlay.write_text(f"name: nothing-was-ever-made-here\nsearches: {{evopress: {{{steps}}}}}\n")
    assert main(["plan", str(overlay)]) == 0
    out = capsys.readouterr().out
    advised = next(line for line in out.splitlines() if "snakemake --cores all" in line)
    assert advised.endswith(f"results/nothing-was-ever-made-here/model.json --configfile {overlay}")
    assert next(line for line in out.splitlines() if "search evopress" in line).split()[-2:] == ["2.05", "k"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("searches: {x: {strategi: uniform}}", "strategy"), ("- 1\n", "a.yaml: holds no settings"), (":\n:", "a.yaml")],
)
def test_bad_settings_end_in_one_error(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "a.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "a.yaml")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and printed.err.startswith("error: ")


def test_planning_imports_no_data_sets_and_no_tasks(tmp_path):
    path = write_settings(tmp_path, "7B")
    code = (
        "import sys; from evopress.cli.commands import main; code = main(['plan', sys.argv[1]]);"
        "assert not {'datasets', 'lm_eval', 'snakemake', 'matplotlib'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_amounts_are_readable():
    shown = [amount(value, "B") for value in (0.0, 7.0, 999.0, 999.9, 1234.0, 5.67e10, 1e15, math.nan)]
    assert shown == ["0 B", "7 B", "999 B", "1.00 kB", "1.23 kB", "56.7 GB", "1.00 PB", "?"]
