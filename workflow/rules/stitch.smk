# The compressed model of each search, as a Hugging Face folder.


rule stitch:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.configuration("{search}"),
        searched_variants,
    output:
        RUN.stitched_manifest("{search}"),
    log:
        LOGS / "stitch" / "{search}.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: KEYS.export("stitch", wildcards.search)),
    message:
        "Stitching the model of {wildcards.search}"
    shell:
        "{params.python:q} scripts/stage.py stitch {params.common:q} --key {params.key:q} --search {wildcards.search:q}"
        " --log {log:q}"


rule archives:
    # Opt-in: `snakemake archives` writes every compressed model packed, in one file each.
    input:
        [RUN.archive(search) for search in SEARCHES],


rule archive:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.configuration("{search}"),
        searched_variants,
    output:
        RUN.archive("{search}"),
    log:
        LOGS / "archive" / "{search}.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: KEYS.export("archive", wildcards.search)),
    message:
        "Compact archive of {wildcards.search}"
    shell:
        "{params.python:q} scripts/stage.py archive {params.common:q} --key {params.key:q} --search {wildcards.search:q} --log {log:q}"


rule decilm:
    # Opt-in: `snakemake decilm` writes every model that lost modules in the layout in which vLLM runs it.
    input:
        [RUN.decilm_manifest(search) for search in SEARCHES if SETTINGS.searches[search].variants in MODULES],


rule decilm_model:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.configuration("{search}"),
        searched_variants,
        RUN.perplexity("{search}"),
        RUN.perplexity(DENSE),
    output:
        RUN.decilm_manifest("{search}"),
    log:
        LOGS / "decilm" / "{search}.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: KEYS.export("decilm", wildcards.search)),
    message:
        "Layout of DeciLM of {wildcards.search}"
    shell:
        "{params.python:q} scripts/stage.py decilm {params.common:q} --key {params.key:q} --search {wildcards.search:q} --log {log:q}"


rule card:
    input:
        RUN.layers,
        RUN.stitched_manifest("{search}"),
        RUN.configuration("{search}"),
        RUN.perplexity("{search}"),
        RUN.perplexity(DENSE),
    output:
        RUN.card("{search}"),
    log:
        LOGS / "card" / "{search}.log",
    params:
        **SCRIPT,
        key=key(lambda wildcards: KEYS.card(wildcards.search)),
    message:
        "Model card of {wildcards.search}"
    shell:
        "{params.python:q} scripts/stage.py card {params.common:q} --key {params.key:q} --search {wildcards.search:q} --log {log:q}"
