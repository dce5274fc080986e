# The levels that a search chose, made once more: each block on what the polished ones before it return.


rule polish:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("calibration"),
        RUN.configuration("{search}"),
    output:
        RUN.polish_effort("{search}"),
    log:
        LOGS / "polish" / "{search}.log",
    wildcard_constraints:
        search=any_of(POLISHED),
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_polish,
    params:
        **SCRIPT,
        how=lambda wildcards: SETTINGS.searches[wildcards.search].polish,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, SETTINGS.searches[wildcards.search].sources[0]),
        key=lambda wildcards: KEYS.polish(wildcards.search),
    message:
        "Polish {wildcards.search}"
    shell:
        "{params.stage:q} polish {params.common:q} --key {params.key:q}"
        " --search {wildcards.search:q} --how {params.how:q} --method {params.settings:q} --log {log:q}"
