# Settings, paths, and what the rules of all stages share. Cluster jobs parse this too: nothing heavy is imported here.

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile
from snakemake.logging import logger
from snakemake.persistence.file import FilePersistence

from evopress.util.accelerators import usable_devices
from evopress.artifacts.origin import require_settings
from evopress.artifacts.paths import DENSE, Run, manifest_path
from evopress.workflow import files
from evopress.workflow import slices
from evopress.workflow.code_dependencies import code_closure
from evopress.config.data import leaks
from evopress.workflow.devices import devices_of_job, devices_of_search
from evopress.workflow.loading import combined, read_yaml
from evopress.config.tasks import require_tasks
from evopress.util.errors import EvopressError
from evopress.util.failures import BriefErrors, quiet_interrupts, why_failed
from evopress.models.block_count import count_blocks
from evopress.plan.foreseen import require_fit
from evopress.plan.memory import Memory
from evopress.plan.model_config import model_config
from studies.run import StudiedSettings, studied_slices

# Jobs keep up to 1 GB of freed memory (glibc; others ignore it): it would give blocks as large as activations and logits
# back at once, only to have those of the next piece of work mapped and cleared page by page again.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))  # the most that glibc takes
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))


def unrecorded(artifacts):
    """Those that exist, though Snakemake has no record of a job that made them or was about to."""
    records = FilePersistence(nolock=True)
    for path, settings in artifacts:
        if path.exists() and not records.metadata(IOFile(path)) and not records._filter_incomplete_keys([str(path)]):
            yield path, settings


try:
    # Snakemake merges its config files into `config` key by key; a section whose kind changes must be replaced whole.
    asked = workflow.config_settings
    VALUES = combined([*map(read_yaml, asked.configfiles), asked.config])
    SETTINGS = StudiedSettings.load(VALUES)
    RESULTS = Run(Path("results") / SETTINGS.name)
    BLOCKS = [f"{block:03d}" for block in range(count_blocks(SETTINGS.model))]
    MODEL_CONFIG = model_config(SETTINGS.model, RESULTS)
    MODEL_FILES = files.model_files(SETTINGS.model)
    TASK_FILES = files.task_files(SETTINGS.evaluation.tasks)
    SEARCH_FILES = {name: files.search_files(made, f"searches.{name}") for name, made in SETTINGS.searches.items()}
    TEXT_FILES = {name: files.text_files(text) for name, text in slices.texts(SETTINGS).items()}
    if workflow.is_main_process:
        require_fit(SETTINGS, MODEL_CONFIG)
        require_tasks(SETTINGS.evaluation.tasks)
        for sentence in leaks(SETTINGS.data):
            logger.warning(f"Warning: {sentence}")
        expected = [*slices.expected_slices(SETTINGS, RESULTS, BLOCKS), *studied_slices(SETTINGS, RESULTS)]
        require_settings(unrecorded(expected), RESULTS.root)
except EvopressError as error:
    raise WorkflowError(str(error)) from None

MEMORY = Memory(SETTINGS, MODEL_CONFIG)
if workflow.is_main_process and not any(isinstance(each, BriefErrors) for each in logger.filters):
    logger.addFilter(BriefErrors())
    quiet_interrupts()


ASKED_ALONE = "EVOPRESS_ASKED_ALONE"  # set where this is parsed to find out what some variants alone need
LOGS = RESULTS.root / "logs"
SEARCHES = list(SETTINGS.searches)
EVALUATION_SETS = list(SETTINGS.data.evaluation)
DROPS = [name for name, variants in SETTINGS.variants.items() if not variants.per_block]
CHAINS = [name for name, variants in SETTINGS.variants.items() if variants.sequential]


def any_of(names):
    """Pattern of a wildcard that is one of the names."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    block=r"\d+",
    shard=r"\d+",
    dataset=any_of(TEXT_FILES),
    variants=any_of(SETTINGS.variants),
    search=any_of(SEARCHES),


def interpreter(wildcards, threads):
    return sys.executable


def common(wildcards, threads):
    compute = SETTINGS.compute.model_copy(update={"threads": SETTINGS.compute.threads or threads})
    trust = ["--trust-remote-code"] if SETTINGS.model.trust_remote_code else []
    return ["--results", RESULTS.root, "--compute", compute.model_dump_json(exclude={"container"}), *trust]


# Parameters of every script. Snakemake takes functions of `threads` for derived values and does not rerun a job when
# they change: another environment, device or number of cores leaves the results as they are.
SCRIPT = {"python": interpreter, "common": common}
MANY_THREADS = 16  # for jobs that run alone; Snakemake gives no more than `--cores`


def code(script, folder="scripts"):
    """The script and the modules it uses: inputs of its rule, so that an edit reruns it."""
    return code_closure(Path(folder) / script)


def with_manifest(*tensors):
    """Inputs that stand for safetensors files: they must be there, but small manifests tell whether they changed."""
    return [*map(ancient, tensors), *map(manifest_path, tensors)]


if not workflow.is_main_process and (devices := os.environ.get("CUDA_VISIBLE_DEVICES")):
    # A job of the cluster may be a group of ours: no more of them at a time than it was given devices.
    workflow.register_resource("gpu", len(devices.split(",")))


if workflow.is_main_process and workflow.nodes is None and "gpu" not in workflow.global_resources:
    # Jobs run on this machine: no more at a time than it has devices. Each leases its own; others would only wait.
    if here := len(usable_devices()):
        workflow.register_resource("gpu", here)


def gpus(wildcards):
    """One GPU for a job that can use it, unless the settings ask for CPUs."""
    return devices_of_job(SETTINGS.compute)


def gpus_of_search(wildcards):
    """A GPU for each process of a search."""
    return devices_of_search(SETTINGS.searches[wildcards.search], SETTINGS.compute)


def threads_of_search(wildcards):
    """Many for a search that judges candidates; others only look at tables, and need no GPU either."""
    return MANY_THREADS if SETTINGS.searches[wildcards.search].workers(1) else 1


def memory_of_chain(wildcards, attempt):
    """MB of a job; where rules do not say, the profile of a cluster does."""
    return MEMORY.chain(attempt)


def memory_of_hessians(wildcards, attempt):
    return MEMORY.hessians(attempt)


def memory_of_search(wildcards, attempt):
    return MEMORY.search(wildcards.search, attempt)


def memory_of_study(wildcards, attempt):
    return MEMORY.study(attempt)


def memory_of_evaluation(wildcards, attempt):
    return MEMORY.evaluation(attempt)


def kept(tensors):
    """Outputs: a safetensors file and its manifest."""
    return [tensors, manifest_path(tensors)]


def removed_after_use(tensors):
    """The same for one that is removed when the last job that needs it has ended."""
    return [temp(path) for path in kept(tensors)]


def chain_before(wildcards):
    """Inputs that stand for the hidden states that the block before has left; none before the first."""
    block = BLOCKS.index(wildcards.block)
    return with_manifest(RESULTS.chain_state(wildcards.variants, BLOCKS[block - 1])) if block else []


def hessians_of_search(wildcards):
    """Inputs that stand for all Hessians, where a strategy reads them."""
    if not SETTINGS.searches[wildcards.search].needs_hessians:
        return []
    return with_manifest(*(RESULTS.hessian(block) for block in BLOCKS))


def earlier_searches(wildcards):
    """What other searches have found, and what that took, where a search depends on them."""
    names = SETTINGS.searches[wildcards.search].depends_on()
    return [path for name in names for path in (RESULTS.configuration(name), RESULTS.effort(name))]


def searched_variants(wildcards):
    """Inputs that stand for all blocks of the variants that a search picks from."""
    return variants_input(SETTINGS.searches[wildcards.search].variants)


def variants_input(variants):
    """Inputs that stand for all blocks of some variants. Where Hessians have been removed after use and others need
    them again, Snakemake would make anew all that was ever made of them: finished variants are taken as they are.
    """
    files = all_blocks(variants)
    return [before_update(path) for path in files] if hessians_gone() and finished(variants) else files


def hessians_gone():
    """Whether there are Hessians that have been removed, or are yet to be made."""
    return not SETTINGS.hessians.keep and not all(RESULTS.hessian(block).exists() for block in BLOCKS)


@cache
def finished(variants):
    """Whether variants are there and up to date: whether Snakemake, asked for nothing else, would run nothing."""
    asked_for, forced = list(map(str, all_blocks(variants))), workflow.dag_settings
    if forced.forceall or forced.forcerun or not workflow.is_main_process or ASKED_ALONE in os.environ:
        return False
    if not all(map(os.path.exists, asked_for)):
        return False
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "settings.json")
        settings.write_text(json.dumps({**VALUES, "complete": True}), encoding="utf-8")
        command = [sys.executable, "-m", "snakemake", "--snakefile", workflow.main_snakefile, "--dry-run", "--cores=1"]
        outcome = subprocess.run(
            [*command, "--configfile", settings, "--", *asked_for],
            env=os.environ | {ASKED_ALONE: variants},
            capture_output=True,
            text=True,
        )
    return outcome.returncode == 0 and "Nothing to be done" in outcome.stdout + outcome.stderr


def all_blocks(variants):
    """Inputs that stand for all blocks of some variants."""
    if variants in DROPS:
        return [RESULTS.module_table(variants)]
    tensors = [RESULTS.variant_tensors(variants, block) for block in BLOCKS]
    tables = [RESULTS.variant_table(variants, block) for block in BLOCKS]
    # Asking for what only a chain leaves makes it run where another propagation has made the variants before.
    states = [manifest_path(RESULTS.chain_state(variants, block)) for block in BLOCKS if variants in CHAINS]
    return [*with_manifest(*tensors), *tables, *states]


def small_results():
    """Outputs of jobs before the report that nobody removes to have the space."""
    searched = [search.variants for search in SETTINGS.searches.values()]
    yield RESULTS.layers
    yield from map(RESULTS.tokens, [*EVALUATION_SETS, *(["search"] if SEARCHES else [])])
    if set(searched) - set(DROPS):
        yield RESULTS.tokens("calibration")
    yield from map(RESULTS.configuration, SEARCHES)
    yield from (RESULTS.export_manifest(search, "huggingface") for search in SEARCHES)
    for model in [DENSE, *SEARCHES]:
        yield from [RESULTS.perplexity(model), RESULTS.tasks(model)]


def large_results():
    """Outputs of jobs before the report that may be removed, once used, to have the space."""
    used = dict.fromkeys(search.variants for search in SETTINGS.searches.values())
    if SETTINGS.hessians.keep and set(used) - set(DROPS) - set(CHAINS):
        yield from map(RESULTS.hessian, BLOCKS)
    for variants in used:
        yield from map(Path, all_blocks(variants))


def unfinished():
    """What a failed job has left undone. Snakemake removes its outputs, with their records, and damaged inputs are set
    aside; neither is missed as long as what was made of it earlier is there: the next run would take an old report for
    the end of one that never got there. What was removed by hand, to have the space, still has its record and is not
    missed.
    """
    records = FilePersistence(nolock=True)
    yield from small_results()
    yield from (path for path in large_results() if not path.exists() and not records.metadata(IOFile(path)))


def studied(tables, section, reported=True):
    """What a study's target asks for; an error where the settings do not name what is to be studied."""

    def inputs(wildcards):
        if not tables:
            raise WorkflowError(f"{section} names nothing to study; add --configfile config/studies/<target>.yaml")
        return [*tables, *([*STUDY_SECTIONS, RESULTS.report, RESULTS.summary] if reported else [])]

    return inputs
