# One level per unit, chosen by each named search; and single effects, which searches that start from them share.


rule effects:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("search"),
        lambda wildcards: [path for one in EFFECTS[wildcards.effects].sources for path in variants_input(one)],
    output:
        RUN.effects_effort("{effects}"),
        RUN.effects("{effects}"),
    log:
        LOGS / "effects" / "{effects}.log",
    threads: MANY_THREADS
    resources:
        gpu=lambda wildcards: devices_of_search(EFFECTS[wildcards.effects], SETTINGS.compute),
        mem_mb=lambda wildcards, attempt: MEMORY.effects(EFFECTS[wildcards.effects], attempt),
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.effects_slice(SETTINGS, wildcards.effects),
        key=lambda wildcards: KEYS.effects(wildcards.effects),
    message:
        "Single effects {wildcards.effects}"
    shell:
        "{params.stage:q} effects {params.common:q} --key {params.key:q}"
        " --settings {params.settings:q} --log {log:q}"


rule search:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("search"),
        searched_variants,
        hessians_of_search,
        effects_of_search,
        earlier_searches,
        lambda wildcards: SEARCH_FILES[wildcards.search],
    output:
        report(
            RUN.configuration("{search}"),
            caption="../report/configuration.rst",
            category="Tables",
            labels={"table": "levels", "model": "{search}"},
        ),
        RUN.trace("{search}"),
        RUN.progress("{search}"),
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
        "{params.stage:q} search {params.common:q} --key {params.key:q}"
        " --name {wildcards.search:q} --strategy {params.settings:q} --log {log:q}"
