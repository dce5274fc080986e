# What the method claims, each with a target of its own and a config under config/studies/. Searches with several seeds,
# and the studies that the settings name, are part of the report as well.

STUDIES = slices.reported_studies(SETTINGS)
CONVERGENCE_TABLES = [RESULTS.convergence] if STUDIES.convergence else []
MONOTONICITY_TABLES = [RESULTS.monotonicity_pairs(study) for study in STUDIES.monotonicity]
STUDY_TABLES = [
    *([RESULTS.comparison] if STUDIES.groups else []),
    *CONVERGENCE_TABLES,
    *MONOTONICITY_TABLES,
    *(RESULTS.monotonicity_candidates(study) for study in STUDIES.monotonicity),
]
STUDY_TEXTS = [text_path(table) for table in [RESULTS.comparison, *CONVERGENCE_TABLES, *MONOTONICITY_TABLES]]


wildcard_constraints:
    study=any_of(STUDIES.monotonicity),


# The last three are comparisons of searches that differ in one respect.
for target in ["comparison", "mutation", "fitness", "steps"]:

    rule:
        name:
            target
        input:
            studied([RESULTS.comparison] if SEARCHES else [], "searches"),


rule monotonicity:
    input:
        studied(MONOTONICITY_TABLES, "studies.monotonicity"),


rule convergence:
    # Without the report, which would fetch and measure a model.
    input:
        studied(CONVERGENCE_TABLES, "studies.convergence", others=()),


rule study_comparison:
    input:
        RESULTS.model_manifest,
        [RESULTS.configuration(search) for search in SEARCHES],
        [RESULTS.effort(search) for search in SEARCHES],
        [RESULTS.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RESULTS.tasks(search) for search in [DENSE, *SEARCHES]],
        code=code("study_comparison.py"),
    output:
        RESULTS.comparison,
        text_path(RESULTS.comparison),
    log:
        LOGS / "studies" / "comparison.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.comparison_slice(SETTINGS),
    message:
        "Comparison of searches over their seeds"
    shell:
        "{params.python:q} scripts/study_comparison.py {params.common:q} --settings {params.settings:q} --log {log:q}"


rule study_convergence:
    input:
        code=code("study_convergence.py"),
    output:
        RESULTS.convergence,
        text_path(RESULTS.convergence),
    log:
        LOGS / "studies" / "convergence.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.convergence_slice(SETTINGS),
    message:
        "Convergence on linear objectives"
    shell:
        "{params.python:q} scripts/study_convergence.py {params.common:q} --settings {params.settings:q} --log {log:q}"


rule study_monotonicity:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.tokens("search"),
        lambda wildcards: variants_input(SETTINGS.studies.monotonicity[wildcards.study].variants),
        code=code("study_monotonicity.py"),
    output:
        RESULTS.monotonicity_candidates("{study}"),
        RESULTS.monotonicity_pairs("{study}"),
        text_path(RESULTS.monotonicity_pairs("{study}")),
    log:
        LOGS / "studies" / "monotonicity_{study}.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_study,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.monotonicity_slice(SETTINGS, wildcards.study),
    message:
        "Monotonicity: {wildcards.study}"
    shell:
        "{params.python:q} scripts/study_monotonicity.py {params.common:q} --name {wildcards.study:q}"
        " --settings {params.settings:q} --log {log:q}"
