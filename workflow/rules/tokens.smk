# Tokens that calibrate, guide the search and evaluate.


rule tokens:
    input:
        RUN.model_manifest,
        lambda wildcards: TEXT_FILES[wildcards.dataset],
    output:
        RUN.tokens("{dataset}"),
    log:
        LOGS / "tokens" / "{dataset}.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.tokens_slice(SETTINGS, wildcards.dataset),
        role=lambda wildcards: "evaluation" if wildcards.dataset in EVALUATION_SETS else wildcards.dataset,
        key=lambda wildcards: KEYS.tokens(wildcards.dataset),
    message:
        "Tokens: {wildcards.dataset}"
    shell:
        "{params.python:q} scripts/stage.py tokens {params.common:q} --key {params.key:q}"
        " --dataset {wildcards.dataset:q} --role {params.role} --settings {params.settings:q} --log {log:q}"
