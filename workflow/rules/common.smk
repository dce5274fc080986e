# Settings, paths, and what the rules of all stages share. Cluster jobs parse this too: nothing heavy is imported here.

import json
import os
import re
import sys
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from evopress.artifacts.paths import DENSE, EMBEDDING, Run, manifest_path
from evopress.data.held_out import leaks
from evopress.config.tasks import require_tasks
from evopress.export.exporters import EXPORTERS
from evopress.models.config_file import count_blocks, model_config
from evopress.util.accelerators import usable_devices
from evopress.util.errors import EvopressError
from evopress.util.job_logs import BriefErrors, quiet_interrupts, why_failed
from evopress.workflow import files, slices
from evopress.workflow.foreseen import require_fit
from evopress.workflow.history import begin, finished_variants
from evopress.workflow.history import History
from evopress.workflow.jobs import Memory, blocks_per_job, devices_of_job, devices_of_search, is_small, minutes
from evopress.workflow.keys import Keys
from evopress.workflow.settings import DEFAULT, combined, read_yaml
from studies.run import StudiedSettings, studied_slices

# Jobs keep up to 1 GB of freed memory (glibc; others ignore it): it would give blocks as large as activations and logits
# back at once, only to have those of the next piece of work mapped and cleared page by page again.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))  # the most that glibc takes
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
# Sizes of activations change with every chunk: growing segments of a GPU's memory leave fewer gaps between them.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

PROJECT = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parents[1]
HERE = Path() if PROJECT == Path.cwd() else PROJECT  # elsewhere where another workflow has this one as a module
try:
    # Snakemake merges its config files into `config` key by key; a section whose kind changes must be replaced whole.
    asked = workflow.config_settings
    overlays = [*map(read_yaml, asked.configfiles), asked.config]
    if not workflow.modifier.is_main_snakefile():
        overlays = [config]  # what the other workflow gives this one
    WRITTEN = combined(overlays, HERE / DEFAULT)
    SETTINGS = StudiedSettings.load(WRITTEN)
    RUN = Run(Path("results") / SETTINGS.name)
    BLOCKS = [f"{block:03d}" for block in range(count_blocks(SETTINGS.model))]
    MODEL_CONFIG = model_config(SETTINGS.model, RUN)
    MODEL_FILES = files.model_files(SETTINGS.model)
    TASK_FILES = files.task_files(SETTINGS.evaluation.tasks)
    SEARCH_FILES = {name: files.search_files(made, f"searches.{name}") for name, made in SETTINGS.searches.items()}
    VARIANTS_FILES = {name: files.variants_files(made, f"variants.{name}") for name, made in SETTINGS.variants.items()}
    TEXT_FILES = {
        name: files.text_files(text, slices.text_setting(name)) for name, text in slices.texts(SETTINGS).items()
    }
    HISTORY = History(RUN.root)
    EXPECTED = [*slices.expected_slices(SETTINGS, RUN, BLOCKS), *studied_slices(SETTINGS, RUN)]
    if workflow.is_main_process:
        require_fit(SETTINGS, MODEL_CONFIG, RUN)
        require_tasks(SETTINGS.evaluation.tasks)
        for sentence in leaks(SETTINGS.data):
            logger.warning(f"Warning: {sentence}")
        HISTORY.require(EXPECTED)
        if not (workflow.modifier.is_main_snakefile() or workflow.output_settings.dryrun):
            begin(HISTORY, EXPECTED, SETTINGS)  # `onstart` of a module never runs
except EvopressError as error:
    raise WorkflowError(str(error)) from None


onstart:
    begin(HISTORY, EXPECTED, SETTINGS)


if workflow.is_main_process and not any(isinstance(each, BriefErrors) for each in logger.filters):
    logger.addFilter(BriefErrors())
    quiet_interrupts()


# The parameter `key` of each rule; jobs of a cluster work theirs out, since artifacts record it.
KEYS = Keys(SETTINGS, HERE)
MEMORY = Memory(SETTINGS, MODEL_CONFIG)
BLOCKS_PER_JOB = blocks_per_job(SETTINGS, MEMORY.hidden_size, len(BLOCKS))
LOGS = RUN.root / "logs"
LOCAL = workflow.is_main_process and workflow.nodes is None  # jobs run on this machine
SEARCHES = list(SETTINGS.searches)
EFFECTS = slices.effects(SETTINGS)
FRONTS = SETTINGS.fronts()
EXPORTS = {search: SETTINGS.exports_of(search) for search in SEARCHES}
EVALUATION_SETS = list(SETTINGS.data.evaluation)
ON_TASKS = SETTINGS.on_tasks()
IN_RUNTIME = SETTINGS.in_runtime()
MODULES = [name for name, method in SETTINGS.variants.items() if not method.per_block]
POLISHED = [name for name, search in SETTINGS.searches.items() if search.polishes]
SEQUENTIAL = [name for name, method in SETTINGS.variants.items() if method.sequential]


def is_current(text):
    """Whether a text is there and nothing that models are measured by is newer."""
    rests_on = [path for search in SEARCHES for path in (RUN.configuration(search), RUN.perplexity(search))]
    newest = max((path.stat().st_mtime for path in rests_on if path.exists()), default=0)
    return text.exists() and text.stat().st_mtime >= newest


def any_of(names):
    """Pattern of a wildcard that is one of the names."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    block=rf"\d+|{EMBEDDING}",
    shard=r"\d+",
    dataset=any_of(TEXT_FILES),
    variants=any_of(SETTINGS.variants),
    search=any_of(SEARCHES),
    effects=any_of(EFFECTS),


def stage(wildcards, threads):
    return [sys.executable, HERE / "scripts/stage.py"]


def study(wildcards, threads):
    return [sys.executable, HERE / "workflow/study.py"]


def common(wildcards, threads):
    compute = SETTINGS.compute.model_copy(update={"threads": SETTINGS.compute.threads or threads})
    trust = ["--trust-remote-code"] if SETTINGS.model.trust_remote_code else []
    return ["--run", RUN.root, "--compute", compute.model_dump_json(exclude={"container", "blocks_per_job"}), *trust]


def written_settings(wildcards, threads):
    """All settings as they were written, for the report to show: not what its result depends on."""
    return json.dumps(WRITTEN, default=str)


# Parameters of every job. Snakemake takes functions of `threads` for derived values and does not rerun a job when
# they change: another environment, device or number of cores leaves the results as they are.
SCRIPT = {"stage": stage, "common": common}
STUDY = {"study": study, "common": common}
ALL_THREADS = 16  # for jobs that run alone; Snakemake gives no more than `--cores`
# For jobs that can use as many. Those that were told to use fewer leave the other cores of this machine to one another;
# sites may tell partitions by the number of threads, so on a cluster the profile alone decides.
MANY_THREADS = (LOCAL and SETTINGS.compute.threads) or ALL_THREADS
CLUSTER_THREADS = 8  # as the profile of a cluster gives other jobs


def with_manifest(*tensors):
    """Inputs that stand for safetensors files: they must be there, but small manifests tell whether they changed."""
    return [*map(ancient, tensors), *map(manifest_path, tensors)]


if not workflow.is_main_process and (devices := os.environ.get("CUDA_VISIBLE_DEVICES")):
    # A job of the cluster may be a group of ours: no more of them at a time than it was given devices.
    workflow.register_resource("gpu", len(devices.split(",")))


if LOCAL and "gpu" not in workflow.global_resources:
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
    """Many for a search that evaluates candidates; others only look at tables, and need no GPU either."""
    return MANY_THREADS if SETTINGS.searches[wildcards.search].workers(1) else 1


def threads_of_variants(wildcards):
    """On this machine, all jobs share the cores; on a cluster, each gets as many as other jobs have there."""
    return min(MANY_THREADS, max(1, workflow.cores * BLOCKS_PER_JOB // len(BLOCKS))) if LOCAL else CLUSTER_THREADS


def threads_of_sequence(wildcards):
    """All, since one job waits for the other; on a cluster, as many as other jobs have there."""
    return MANY_THREADS if LOCAL else CLUSTER_THREADS


def threads_beside_others(wildcards):
    """Half of the cores for jobs of a small model, which take as long to start as to work, and start on one core."""
    half = workflow.cores // 2 if LOCAL and is_small(SETTINGS, MEMORY.hidden_size) else MANY_THREADS
    return max(1, min(MANY_THREADS, half))


def memory_of_variants(wildcards, attempt):
    """MB of a job; where rules do not say, the profile of a cluster does."""
    return MEMORY.variants(attempt)


def minutes_of_variants(wildcards, attempt):
    """The same of minutes."""
    return minutes(SETTINGS, MEMORY.hidden_size, len(BLOCKS), attempt)


def memory_of_sequence(wildcards, attempt):
    return MEMORY.chain(attempt)


def memory_of_embedding(wildcards, attempt):
    return MEMORY.embedding(wildcards.variants, attempt)


def memory_of_hessians(wildcards, attempt):
    return MEMORY.hessians(attempt)


def memory_of_polish(wildcards, attempt):
    return MEMORY.polish(wildcards.search, attempt)


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


def state_before(blocks):
    """Inputs that stand for the hidden states before the blocks of a job; none before the first."""

    def inputs(wildcards):
        first = BLOCKS.index(blocks[0].format(block=wildcards.get("block")))
        return with_manifest(RUN.chain_state(wildcards.variants, BLOCKS[first - 1])) if first else []

    return inputs


def named(blocks):
    """Parameter that names the blocks of a job; like those of all jobs, it makes none run again."""

    def parameter(wildcards, threads):
        return [block.format(block=wildcards.get("block")) for block in blocks]

    return parameter


def calibrated(blocks):
    """Inputs that variants of some blocks are made from: their Hessians, or what the user gives in their place."""

    def inputs(wildcards):
        if SETTINGS.variants[wildcards.variants].needs_hessians:
            return with_manifest(*(RUN.hessian(block.format(block=wildcards.get("block"))) for block in blocks))
        return VARIANTS_FILES[wildcards.variants]

    return inputs


def calibrated_embedding(wildcards):
    """The same for embedding and head, which are never observed behind compressed blocks."""
    method = SETTINGS.variants[wildcards.variants]
    own = method.needs_hessians or method.sequential
    return with_manifest(RUN.hessian(EMBEDDING)) if own else VARIANTS_FILES[wildcards.variants]


def hessians_of_search(wildcards):
    """Inputs that stand for all Hessians, where a strategy scores weights by them."""
    if not SETTINGS.searches[wildcards.search].needs_hessians:
        return []
    return with_manifest(*(RUN.hessian(block) for block in BLOCKS))


def effects_of_search(wildcards):
    """Single effects, and what they took, where a search starts from them."""
    return effects_input(SETTINGS.searches[wildcards.search])


def effects_input(search):
    effects = search.effects()
    return [RUN.effects(effects.name), RUN.effects_effort(effects.name)] if effects else []


def earlier_searches(wildcards):
    """What other searches have found, and what that took, where a search starts from it."""
    names = SETTINGS.searches[wildcards.search].depends_on()
    return [path for name in names for path in (RUN.configuration(name), RUN.effort(name))]


def searched_variants(wildcards):
    """Inputs that stand for all blocks of the variants that a search picks from."""
    return [path for source in SETTINGS.searches[wildcards.search].sources for path in variants_input(source)]


@cache
def variants_input(variants):
    """Inputs that stand for all blocks of some variants. Where Hessians have been removed after use and others need
    them again, Snakemake would make anew all that was ever made of them: finished variants are taken as they are.
    """
    paths, parts = all_blocks(variants), parts_of(variants)
    gone = not SETTINGS.hessians.keep and not all(RUN.hessian(part).exists() for part in parts)
    if gone and workflow.is_main_process and SETTINGS.variants[variants].needs_hessians:
        read = {RUN.model_manifest: MODEL_FILES, RUN.tokens("calibration"): TEXT_FILES["calibration"]}
        if finished_variants(RUN, variants, parts, KEYS, read):
            return [before_update(path) for path in paths]
    return paths


def parts_of(variants):
    """Blocks, and what stands for one where embedding and head are compressed as well."""
    return [*BLOCKS, EMBEDDING] if SETTINGS.variants[variants].compresses_embedding else BLOCKS


def all_blocks(variants):
    """Inputs that stand for all blocks of some variants."""
    if variants in MODULES:
        return [RUN.module_table(variants)]
    parts = parts_of(variants)
    tensors = [RUN.variant_tensors(variants, part) for part in parts]
    tables = [RUN.variant_table(variants, part) for part in parts]
    # Asking for what only a sequence leaves makes it run where another propagation has made the variants before.
    states = [manifest_path(RUN.chain_state(variants, block)) for block in BLOCKS if variants in SEQUENTIAL]
    return [*with_manifest(*tensors), *tables, *states]


def exporter_of(wildcards):
    """The exporter of a job, with its settings; as a target of its own, one need not be in the settings."""
    return SETTINGS.exporter_of(wildcards.search, wildcards.exporter)


def polished(wildcards):
    """Inputs that stand for what a search chose, made once more; none where it is exported as the variants have it."""
    return [RUN.polish_effort(wildcards.search)] if wildcards.search in POLISHED else []


def exports_read(wildcards):
    """Inputs that stand for the other exports of a search that one is made of."""
    return [RUN.export_manifest(wildcards.search, one) for one in exporter_of(wildcards).reads]


def exported():
    """Manifests and cards of all models that the settings ask for."""
    for search, exporters in EXPORTS.items():
        for one in exporters:
            yield RUN.export_manifest(search, one.exporter)
            if one.has_card:
                yield RUN.card(search, one.exporter)


def model_of(wildcards):
    """Manifest of the model that a search has made."""
    return RUN.export_manifest(wildcards.search, "huggingface")


def runtime_of(wildcards):
    """What llama.cpp does with the file of an export, where that is measured."""
    measured = wildcards.exporter == "gguf" and wildcards.search in IN_RUNTIME
    return [RUN.runtime(wildcards.search)] if measured else []


def small_results():
    """Outputs of all stages that nobody removes to have the space. Snakemake removes the outputs of a job that failed,
    and does not miss them as long as what was made of them earlier is there: the next run would take an old report for
    the end of one that never got there. So all are asked for.
    """
    yield from [RUN.model_manifest, RUN.layers]
    searched = {source for search in SETTINGS.searches.values() for source in search.sources}
    yield from map(RUN.tokens, [*EVALUATION_SETS, *(["search"] if SEARCHES else [])])
    used = [SETTINGS.variants[name] for name in searched]
    if POLISHED or any(method.needs_hessians or method.sequential for method in used):
        yield RUN.tokens("calibration")
    yield from map(RUN.effects, EFFECTS)
    yield from map(RUN.configuration, SEARCHES)
    yield from map(RUN.polish_effort, POLISHED)
    yield from exported()
    yield from map(RUN.perplexity, [DENSE, *SEARCHES])
    yield from map(RUN.tasks, ON_TASKS)
    yield from map(RUN.runtime, IN_RUNTIME)


def studied(tables, section, reported=True):
    """What a study's target asks for; an error where the settings do not name what is to be studied."""

    def inputs(wildcards):
        if not tables:
            raise WorkflowError(f"{section} names nothing to study; add --configfile config/studies/<target>.yaml")
        return [*tables, *([*STUDY_SECTIONS, RUN.report, RUN.summary] if reported else [])]

    return inputs
