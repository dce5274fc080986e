"""What jobs ask a cluster for, by the profile: every rule is in it, and GPUs follow the settings."""

import re
from collections.abc import Callable
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import REPOSITORY, Checkout
from snakemake.cli import args_to_api, parse_args

PROFILE = REPOSITORY / "workflow/profiles/slurm/config.yaml"
EXAMPLE = REPOSITORY / "workflow/profiles/slurm/example.yaml"
RULES = [rule for file in (REPOSITORY / "workflow/rules").glob("*.smk") for rule in file.read_text().split("rule ")[1:]]
Asked = Callable[[dict[str, Any]], dict[str, dict[str, Any]]]
JOBS = {rule.split(":")[0] for rule in RULES if "shell:" in rule}


def test_memory_and_time_of_every_rule_grow_and_retries_are_in_the_profile_alone() -> None:
    profile = yaml.safe_load(PROFILE.read_text())
    assert set(profile["set-resources"]) == JOBS
    asking = {rule.split(":")[0] for rule in RULES if "mem_mb=" in rule}
    assert {"variants_embedding", "hessians", "search", "polish", "perplexity"} < asking
    searching = {"search", "effects", "study_peer_search"}
    for rule, resources in profile["set-resources"].items():
        expected = {"runtime"} | (set() if rule in asking else {"mem_mb"}) | ({"nodes"} if rule in searching else set())
        assert set(resources) == expected, rule
        assert all(re.fullmatch(r"\d+ \* attempt", resources[each]) for each in expected - {"nodes"}), rule
    many = {rule.split(":")[0] for rule in RULES if re.search("threads: (MANY|ALL)_THREADS", rule)}
    assert many <= set(profile["set-threads"])
    assert set(profile["set-threads"].values()) == {profile["cores"]}  # so that members of a group take turns
    assert f"CLUSTER_THREADS = {profile['cores']} " in (REPOSITORY / "workflow/rules/common.smk").read_text()
    assert profile["retries"] >= 1
    assert not any("retries" in rule for rule in RULES)


def test_no_profile_overrides_another_unawares() -> None:
    default = yaml.safe_load((REPOSITORY / "workflow/profiles/default/config.yaml").read_text())
    cluster, site = yaml.safe_load(PROFILE.read_text()), yaml.safe_load(EXAMPLE.read_text())
    assert len({*default, *cluster, *site}) == len(default) + len(cluster) + len(site)


@pytest.fixture
def asked(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Asked:
    """What a job of each rule would ask for, by settings."""
    checkout = Checkout.make(tmp_path / "evopress")

    def ask(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
        (checkout.root / "settings.yaml").write_text(yaml.safe_dump(settings))
        caplog.clear()
        with chdir(checkout.root):
            profiles = ["--profile", "workflow/profiles/slurm", "--profile", "workflow/profiles/slurm/example.yaml"]
            parser, arguments = parse_args(["--dry-run", "--forceall", *profiles, "--configfile", "settings.yaml"])
            assert args_to_api(arguments, parser)
        jobs = [record for record in caplog.records if hasattr(record, "rule_name")]
        return {job.rule_name: dict(job.resources.items()) for job in jobs if job.rule_name != "all"}

    return ask


@pytest.mark.skipif(not find_spec("snakemake_executor_plugin_slurm"), reason="needs evopress[slurm]")
def test_stages_ask_for_a_gpu_each_and_a_search_for_one_per_process(settings: dict[str, Any], asked: Asked) -> None:
    with_gpus = {"hessians", "variants", "search", "perplexity", "perplexity_dense", "tasks", "tasks_dense"}
    even = {"strategy": "uniform", "variants": "gptq", "target": 3.0}

    jobs = asked(settings | {"compute": {"processes": 4}})
    assert jobs.keys() - with_gpus == {"model", "tokens", "export", "card", "report"}
    assert {rule: job["gpu"] for rule, job in jobs.items() if job.get("gpu")} == dict.fromkeys(with_gpus, 1) | {
        "search": 4
    }
    assert {rule for rule, job in jobs.items() if job["slurm_partition"] == "gpu"} == with_gpus
    assert {job["slurm_partition"] for rule, job in jobs.items() if rule not in with_gpus} == {"cpu"}
    assert {job["slurm_account"] for job in jobs.values()} == {"lab"}
    assert (jobs["variants"]["runtime"], jobs["search"]["mem_mb"], jobs["search"]["nodes"]) == (60, 112_000, 1)

    together = asked(settings | {"compute": {"blocks_per_job": 2}})
    assert {rule for rule in together if rule.startswith("variants")} == {"variants_000", "variants_002"}
    for rule in ("variants_000", "variants_002"):
        assert [together[rule][each] for each in ("gpu", "mem_mb", "runtime", "slurm_partition")] == [
            jobs["variants"][each] for each in ("gpu", "mem_mb", "runtime", "slurm_partition")
        ]

    even = asked(settings | {"searches": {"even": even}})["search"]
    assert (even["gpu"], even["slurm_partition"], even["mem_mb"]) == (0, "cpu", 64_000)
    cpu = asked(settings | {"compute": {"device": "cpu", "processes": 4}})
    assert {cpu[rule]["gpu"] for rule in with_gpus} == {0}


@pytest.mark.skipif(not find_spec("snakemake_executor_plugin_slurm"), reason="needs evopress[slurm]")
def test_memory_follows_from_tokens_and_processes(settings: dict[str, Any], asked: Asked, tmp_path: Path) -> None:
    """The tiny model has 32 numbers of hidden state."""
    text = tmp_path / "long.txt"
    text.write_text("a line of text\n" * (1 << 18))
    more = {"path": str(text), "tokens": 1 << 20}
    calibration, search = (settings["data"][role] | more for role in ("calibration", "search"))
    chain = settings["variants"]["gptq"] | {"propagation": "sequential", "propagation_level": "3"}
    many = settings | {
        "model": settings["model"] | {"dtype": "bfloat16"},
        "data": settings["data"] | {"calibration": calibration, "search": search},
        "variants": {"gptq": chain},
    }
    states = (1 << 20) * 32 * 2 // 1_000_000
    one, two = asked(many), asked(many | {"compute": {"processes": 2, "memory_gb": 10}})
    assert one["variants_sequential"]["mem_mb"] == 16_000 + states
    assert one["search"]["mem_mb"] == 48_000 + 16_000 + states
    assert two["search"]["mem_mb"] == 48_000 + 2 * (22_000 + states)


def test_jobs_that_use_fewer_threads_leave_the_other_cores(settings: dict[str, Any], tmp_path: Path) -> None:
    checkout = Checkout.make(tmp_path / "evopress")
    for given, asked in ((None, 8), (1, 1), (3, 3)):
        jobs = {job.rule: job.threads for job in checkout.jobs(settings | {"compute": {"threads": given}}, cores=8)}
        assert [jobs[rule] for rule in ("hessians", "search", "export")] == [asked, asked, 1]
        assert max(jobs.values()) == asked
