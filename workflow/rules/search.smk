# One level per unit, chosen by each named search.


rule search:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("search"),
        searched_variants,
        hessians_of_search,
        earlier_searches,
        lambda wildcards: SEARCH_FILES[wildcards.search],
    output:
        RUN.configuration("{search}"),
        RUN.trace("{search}"),
        RUN.effort("{search}"),
    log:
        LOGS / "search" / "{search}.log",
    threads: threads_of_search
    resources:
        gpu=gpus_of_search,
        mem_mb=memory_of_search,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.search_slice(SETTINGS, wildcards.search),
        key=lambda wildcards: KEYS.search(wildcards.search),
    message:
        "Search {wildcards.search}"
    shell:
        "{params.python:q} scripts/stage.py search {params.common:q} --key {params.key:q}"
        " --name {wildcards.search:q} --strategy {params.settings:q} --log {log:q}"
