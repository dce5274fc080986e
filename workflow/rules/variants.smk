# Every linear layer of a block, compressed to every level: each block on its own, or one after the other in sequence.
# Of depth pruning, only the list of modules that may be dropped.


rule variants:
    input:
        RUN.model_manifest,
        RUN.layers,
        calibrated,
    output:
        kept(RUN.variant_tensors("{variants}", "{block}")),
        RUN.variant_table("{variants}", "{block}"),
    log:
        LOGS / "variants" / "{variants}" / "block_{block}.log",
    wildcard_constraints:
        block=r"\d+",
        variants=any_of(set(SETTINGS.variants) - set(SEQUENTIAL) - set(MODULES)),
    resources:
        gpu=gpus,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
        key=lambda wildcards: KEYS.variants(wildcards.variants),
    message:
        "Variants {wildcards.variants}: block {wildcards.block}"
    shell:
        "{params.python:q} scripts/stage.py variants {params.common:q} --key {params.key:q}"
        " --name {wildcards.variants:q} --block {wildcards.block} --method {params.settings:q} --log {log:q}"


rule variants_embedding:
    input:
        RUN.model_manifest,
        calibrated_embedding,
    output:
        kept(RUN.variant_tensors("{variants}", EMBEDDING)),
        RUN.variant_table("{variants}", EMBEDDING),
    log:
        LOGS / "variants" / "{variants}" / "embedding.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_embedding,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
        key=lambda wildcards: KEYS.variants(wildcards.variants),
    message:
        "Variants {wildcards.variants}: embedding and head"
    shell:
        "{params.python:q} scripts/stage.py variants_embedding {params.common:q} --key {params.key:q}"
        " --name {wildcards.variants:q} --method {params.settings:q} --log {log:q}"


rule variants_sequential:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("calibration"),
        block_before,
    output:
        kept(RUN.variant_tensors("{variants}", "{block}")),
        RUN.variant_table("{variants}", "{block}"),
        temp(RUN.chain_state("{variants}", "{block}")),
        manifest_path(RUN.chain_state("{variants}", "{block}")),
    log:
        LOGS / "variants" / "{variants}" / "block_{block}.log",
    wildcard_constraints:
        block=r"\d+",
        variants=any_of(SEQUENTIAL),
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_sequence,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
        key=lambda wildcards: KEYS.variants(wildcards.variants),
    message:
        "Variants {wildcards.variants}: block {wildcards.block}, after those before it"
    shell:
        "{params.python:q} scripts/stage.py variants_sequential {params.common:q} --key {params.key:q}"
        " --name {wildcards.variants:q} --block {wildcards.block} --method {params.settings:q} --log {log:q}"


rule variants_modules:
    input:
        RUN.model_manifest,
        RUN.layers,
    output:
        RUN.module_table("{variants}"),
    log:
        LOGS / "variants" / "{variants}" / "modules.log",
    wildcard_constraints:
        variants=any_of(MODULES),
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
        key=lambda wildcards: KEYS.variants(wildcards.variants),
    message:
        "Variants {wildcards.variants}: modules that may be dropped"
    shell:
        "{params.python:q} scripts/stage.py variants_modules {params.common:q} --key {params.key:q}"
        " --name {wildcards.variants:q} --method {params.settings:q} --log {log:q}"
