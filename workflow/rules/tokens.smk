# Tokens that calibrate, guide the search and evaluate.


rule tokens:
    input:
        RESULTS.model_manifest,
        lambda wildcards: TEXT_FILES[wildcards.dataset],
        code=code("tokens.py"),
    output:
        RESULTS.tokens("{dataset}"),
    log:
        LOGS / "tokens" / "{dataset}.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.tokens_slice(SETTINGS, wildcards.dataset),
    message:
        "Tokens: {wildcards.dataset}"
    shell:
        "{params.python:q} scripts/tokens.py {params.common:q} --dataset {wildcards.dataset:q}"
        " --settings {params.settings:q} --log {log:q}"
