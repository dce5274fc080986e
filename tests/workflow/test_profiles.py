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
    for rule, resources in profile["set-resources"].items():
        assert set(resources) == {"mem_mb", "runtime"} | ({"nodes"} if rule == "search" else set()), rule
        assert all(re.fullmatch(r"\d+ \* attempt", resources[each]) for each in ("mem_mb", "runtime")), rule
    assert set(profile["set-threads"].values()) == {profile["cores"]}  # so that members of a group take turns
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
    assert jobs.keys() - with_gpus == {"model", "tokens", "stitch", "card", "report"}
    assert {rule: job["gpu"] for rule, job in jobs.items() if job.get("gpu")} == dict.fromkeys(with_gpus, 1) | {
        "search": 4
    }
    assert {(job["slurm_partition"], job["slurm_account"]) for job in jobs.values()} == {("gpu", "lab")}
    assert (jobs["variants"]["runtime"], jobs["search"]["mem_mb"], jobs["search"]["nodes"]) == (60, 64000, 1)

    assert asked(settings | {"searches": {"even": even}})["search"]["gpu"] == 0
    cpu = asked(settings | {"compute": {"device": "cpu", "processes": 4}})
    assert {cpu[rule]["gpu"] for rule in with_gpus} == {0}
