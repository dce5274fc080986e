# The compressed model of each search, as a Hugging Face folder.


rule stitch:
    input:
        RESULTS.model_manifest,
        RESULTS.configuration("{search}"),
        searched_variants,
        code=code("stitch.py"),
    output:
        RESULTS.stitched_manifest("{search}"),
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
        [RESULTS.archive(search) for search in SEARCHES],


rule archive:
    input:
        RESULTS.model_manifest,
        RESULTS.configuration("{search}"),
        searched_variants,
        code=code("archive.py"),
    output:
        RESULTS.archive("{search}"),
    log:
        LOGS / "archive" / "{search}.log",
    params:
        **SCRIPT,
    message:
        "Compact archive of {wildcards.search}"
    shell:
        "{params.python:q} scripts/archive.py {params.common:q} --search {wildcards.search:q} --log {log:q}"


rule card:
    input:
        RESULTS.stitched_manifest("{search}"),
        RESULTS.configuration("{search}"),
        RESULTS.perplexity("{search}"),
        RESULTS.perplexity(DENSE),
        code=code("card.py"),
    output:
        RESULTS.card("{search}"),
    log:
        LOGS / "card" / "{search}.log",
    params:
        **SCRIPT,
    message:
        "Model card of {wildcards.search}"
    shell:
        "{params.python:q} scripts/card.py {params.common:q} --search {wildcards.search:q} --log {log:q}"
