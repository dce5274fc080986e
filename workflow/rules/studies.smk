# What the method claims, each with a target of its own and a config under config/studies/. Searches with several seeds,
# and the studies that the settings name, are part of the report as well. The code is in workflow/studies/.

from studies.paths import candidates_path, comparison_path, convergence_path, pairs_path, sections_path, text_path
from studies.run import comparison_slice, convergence_slice, monotonicity_slice, reported_studies, study_key

STUDIES = reported_studies(SETTINGS)
COMPARISON = comparison_path(RUN)
CONVERGENCE_TABLES = [convergence_path(RUN)] if STUDIES.convergence else []
MONOTONICITY_TABLES = [pairs_path(RUN, study) for study in STUDIES.monotonicity]
STUDY_TABLES = [
    *([COMPARISON] if STUDIES.groups else []),
    *CONVERGENCE_TABLES,
    *MONOTONICITY_TABLES,
    *(candidates_path(RUN, study) for study in STUDIES.monotonicity),
]
STUDY_TEXTS = [text_path(table) for table in [COMPARISON, *CONVERGENCE_TABLES, *MONOTONICITY_TABLES]]
STUDY_SECTIONS = [sections_path(RUN)] if STUDY_TABLES else []


wildcard_constraints:
    study=any_of(STUDIES.monotonicity),


# The last three are comparisons of searches that differ in one respect.
for target in ["comparison", "mutation", "fitness", "steps"]:

    rule:
        name:
            target
        input:
            studied([COMPARISON] if SEARCHES else [], "searches"),


rule monotonicity:
    input:
        studied(MONOTONICITY_TABLES, "studies.monotonicity"),


rule convergence:
    # Without the report, which would fetch and measure a model.
    input:
        studied(CONVERGENCE_TABLES, "studies.convergence", reported=False),


rule study_comparison:
    input:
        RUN.model_manifest,
        [RUN.configuration(search) for search in SEARCHES],
        [RUN.effort(search) for search in SEARCHES],
        [RUN.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RUN.tasks(search) for search in [DENSE, *SEARCHES]],
    output:
        COMPARISON,
        text_path(COMPARISON),
    log:
        LOGS / "studies" / "comparison.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: study_key(KEYS, SETTINGS, "comparison")),
        settings=lambda wildcards: comparison_slice(SETTINGS),
    message:
        "Comparison of searches over their seeds"
    shell:
        "{params.python:q} workflow/study.py comparison {params.common:q} --key {params.key:q} --settings {params.settings:q} --log {log:q}"


rule study_convergence:
    output:
        convergence_path(RUN),
        text_path(convergence_path(RUN)),
    log:
        LOGS / "studies" / "convergence.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: study_key(KEYS, SETTINGS, "convergence")),
        settings=lambda wildcards: convergence_slice(SETTINGS),
    message:
        "Convergence on linear objectives"
    shell:
        "{params.python:q} workflow/study.py convergence {params.common:q} --key {params.key:q} --settings {params.settings:q} --log {log:q}"


rule study_monotonicity:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("search"),
        lambda wildcards: variants_input(SETTINGS.studies.monotonicity[wildcards.study].variants),
    output:
        candidates_path(RUN, "{study}"),
        pairs_path(RUN, "{study}"),
        text_path(pairs_path(RUN, "{study}")),
    log:
        LOGS / "studies" / "monotonicity_{study}.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_study,
    params:
        **SCRIPT,
        key=key(lambda wildcards: study_key(KEYS, SETTINGS, "monotonicity", wildcards.study)),
        settings=lambda wildcards: monotonicity_slice(SETTINGS, wildcards.study),
    message:
        "Monotonicity: {wildcards.study}"
    shell:
        "{params.python:q} workflow/study.py monotonicity {params.common:q} --key {params.key:q} --name {wildcards.study:q}"
        " --settings {params.settings:q} --log {log:q}"


rule study_report:
    input:
        RUN.model_manifest,
        STUDY_TABLES,
        [RUN.configuration(search) for members in STUDIES.groups.values() for search in members],
        [RUN.trace(search) for members in STUDIES.groups.values() for search in members],
    output:
        sections_path(RUN),
    log:
        LOGS / "studies" / "report.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: study_key(KEYS, SETTINGS, "report")),
        settings=lambda wildcards: STUDIES.model_dump_json(),
    message:
        "Studies for the report"
    shell:
        "{params.python:q} workflow/study.py report {params.common:q} --key {params.key:q} --settings {params.settings:q} --log {log:q}"
