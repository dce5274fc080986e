# The compressed model of each search, as a Hugging Face folder.


rule stitch:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.configuration("{search}"),
        searched_variants,
        code=code("stitch.py"),
    output:
        RESULTS.export_manifest("{search}", "huggingface"),
    log:
        LOGS / "stitch" / "{search}.log",
    params:
        **SCRIPT,
    message:
        "Stitching the model of {wildcards.search}"
    shell:
        "{params.python:q} scripts/stitch.py {params.common:q} --search {wildcards.search:q}" " --log {log:q}"


rule archives:
    # Opt-in: `snakemake archives` writes every compressed model packed, in one file each.
    input:
        [RESULTS.export_manifest(search, "archive") for search in SEARCHES],


rule archive:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.configuration("{search}"),
        searched_variants,
        code=code("archive.py"),
    output:
        RESULTS.export_manifest("{search}", "archive"),
    log:
        LOGS / "archive" / "{search}.log",
    params:
        **SCRIPT,
    message:
        "Compact archive of {wildcards.search}"
    shell:
        "{params.python:q} scripts/archive.py {params.common:q} --search {wildcards.search:q} --log {log:q}"


rule decilm:
    # Opt-in: `snakemake decilm` writes every model that lost modules in the layout in which vLLM runs it.
    input:
        [RESULTS.export_manifest(search, "decilm") for search in SEARCHES if SETTINGS.searches[search].variants in DROPS],


rule decilm_model:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.configuration("{search}"),
        searched_variants,
        RESULTS.perplexity("{search}"),
        RESULTS.perplexity(DENSE),
        code=code("decilm.py"),
    output:
        RESULTS.export_manifest("{search}", "decilm"),
    log:
        LOGS / "decilm" / "{search}.log",
    params:
        **SCRIPT,
    message:
        "Layout of DeciLM of {wildcards.search}"
    shell:
        "{params.python:q} scripts/decilm.py {params.common:q} --search {wildcards.search:q} --log {log:q}"


rule card:
    input:
        RESULTS.layers,
        RESULTS.export_manifest("{search}", "huggingface"),
        RESULTS.configuration("{search}"),
        RESULTS.perplexity("{search}"),
        RESULTS.perplexity(DENSE),
        code=code("card.py"),
    output:
        RESULTS.card("{search}", "huggingface"),
    log:
        LOGS / "card" / "{search}.log",
    params:
        **SCRIPT,
    message:
        "Model card of {wildcards.search}"
    shell:
        "{params.python:q} scripts/card.py {params.common:q} --search {wildcards.search:q} --log {log:q}"
