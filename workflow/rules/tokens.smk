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
        files=lambda wildcards: TEXT_FILES[wildcards.dataset],  # one that leaves changes no other's time
        key=lambda wildcards: KEYS.tokens(wildcards.dataset),
    message:
        "Tokens: {wildcards.dataset}"
    shell:
        "{params.stage:q} tokens {params.common:q} --key {params.key:q}"
        " --dataset {wildcards.dataset:q} --role {params.role} --settings {params.settings:q} --log {log:q}"
