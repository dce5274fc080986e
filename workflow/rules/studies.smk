# What the method claims, each with a target of its own and a config under config/studies/. Searches with several seeds,
# and the studies that the settings name, are part of the report as well. The code is in workflow/studies/.

from studies.paths import candidates_path, comparison_path, convergence_path, pairs_path, sections_path, text_path
from studies.run import comparison_slice, convergence_slice, monotonicity_slice, reported_studies

STUDIES = reported_studies(SETTINGS)
COMPARISON = comparison_path(RESULTS)
CONVERGENCE_TABLES = [convergence_path(RESULTS)] if STUDIES.convergence else []
MONOTONICITY_TABLES = [pairs_path(RESULTS, study) for study in STUDIES.monotonicity]
STUDY_TABLES = [
    *([COMPARISON] if STUDIES.groups else []),
    *CONVERGENCE_TABLES,
    *MONOTONICITY_TABLES,
    *(candidates_path(RESULTS, study) for study in STUDIES.monotonicity),
]
STUDY_TEXTS = [text_path(table) for table in [COMPARISON, *CONVERGENCE_TABLES, *MONOTONICITY_TABLES]]
STUDY_SECTIONS = [sections_path(RESULTS)] if STUDY_TABLES else []


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
        RESULTS.model_manifest,
        [RESULTS.configuration(search) for search in SEARCHES],
        [RESULTS.effort(search) for search in SEARCHES],
        [RESULTS.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RESULTS.tasks(search) for search in [DENSE, *SEARCHES]],
        code=code("study_comparison.py", "workflow"),
    output:
        COMPARISON,
        text_path(COMPARISON),
    log:
        LOGS / "studies" / "comparison.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: comparison_slice(SETTINGS),
    message:
        "Comparison of searches over their seeds"
    shell:
        "{params.python:q} workflow/study_comparison.py {params.common:q} --settings {params.settings:q} --log {log:q}"


rule study_convergence:
    input:
        code=code("study_convergence.py", "workflow"),
    output:
        convergence_path(RESULTS),
        text_path(convergence_path(RESULTS)),
    log:
        LOGS / "studies" / "convergence.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: convergence_slice(SETTINGS),
    message:
        "Convergence on linear objectives"
    shell:
        "{params.python:q} workflow/study_convergence.py {params.common:q} --settings {params.settings:q} --log {log:q}"


rule study_monotonicity:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.tokens("search"),
        lambda wildcards: variants_input(SETTINGS.studies.monotonicity[wildcards.study].variants),
        code=code("study_monotonicity.py", "workflow"),
    output:
        candidates_path(RESULTS, "{study}"),
        pairs_path(RESULTS, "{study}"),
        text_path(pairs_path(RESULTS, "{study}")),
    log:
        LOGS / "studies" / "monotonicity_{study}.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_study,
    params:
        **SCRIPT,
        settings=lambda wildcards: monotonicity_slice(SETTINGS, wildcards.study),
    message:
        "Monotonicity: {wildcards.study}"
    shell:
        "{params.python:q} workflow/study_monotonicity.py {params.common:q} --name {wildcards.study:q}"
        " --settings {params.settings:q} --log {log:q}"


rule study_report:
    input:
        RESULTS.model_manifest,
        STUDY_TABLES,
        [RESULTS.configuration(search) for members in STUDIES.groups.values() for search in members],
        [RESULTS.trace(search) for members in STUDIES.groups.values() for search in members],
        code=code("study_report.py", "workflow"),
    output:
        sections_path(RESULTS),
    log:
        LOGS / "studies" / "report.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: STUDIES.model_dump_json(),
    message:
        "Studies for the report"
    shell:
        "{params.python:q} workflow/study_report.py {params.common:q} --settings {params.settings:q} --log {log:q}"
