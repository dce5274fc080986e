# One level per unit, chosen by each named search.


rule search:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.tokens("search"),
        searched_variants,
        hessians_of_search,
        earlier_searches,
        lambda wildcards: SEARCH_FILES[wildcards.search],
        code=code("search.py"),
    output:
        RESULTS.configuration("{search}"),
        RESULTS.trace("{search}"),
        RESULTS.effort("{search}"),
    log:
        LOGS / "search" / "{search}.log",
    threads: threads_of_search
    resources:
        gpu=gpus_of_search,
        mem_mb=memory_of_search,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.search_slice(SETTINGS, wildcards.search),
    message:
        "Search {wildcards.search}"
    shell:
        "{params.python:q} scripts/search.py {params.common:q} --name {wildcards.search:q}"
        " --settings {params.settings:q} --log {log:q}"
