# Every linear layer of a block, compressed to every level: each block on its own, or one after the other in a chain.
# Of depth pruning, only the list of modules that may be dropped.


rule variants:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        with_manifest(RESULTS.hessian("{block}")),
        code=code("variants.py"),
    output:
        kept(RESULTS.variant_tensors("{variants}", "{block}")),
        RESULTS.variant_table("{variants}", "{block}"),
    log:
        LOGS / "variants" / "{variants}" / "block_{block}.log",
    wildcard_constraints:
        variants=any_of(set(SETTINGS.variants) - set(CHAINS) - set(DROPS)),
    resources:
        gpu=gpus,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
    message:
        "Variants {wildcards.variants}: block {wildcards.block}"
    shell:
        "{params.python:q} scripts/variants.py {params.common:q} --name {wildcards.variants:q}"
        " --block {wildcards.block} --settings {params.settings:q} --log {log:q}"


rule variants_chain:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.tokens("calibration"),
        chain_before,
        code=code("variants_chain.py"),
    output:
        kept(RESULTS.variant_tensors("{variants}", "{block}")),
        RESULTS.variant_table("{variants}", "{block}"),
        temp(RESULTS.chain_state("{variants}", "{block}")),
        manifest_path(RESULTS.chain_state("{variants}", "{block}")),
    log:
        LOGS / "variants" / "{variants}" / "block_{block}.log",
    wildcard_constraints:
        variants=any_of(CHAINS),
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_chain,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
    message:
        "Variants {wildcards.variants}: block {wildcards.block}, after those before it"
    shell:
        "{params.python:q} scripts/variants_chain.py {params.common:q} --name {wildcards.variants:q}"
        " --block {wildcards.block} --settings {params.settings:q} --log {log:q}"


rule variants_drop:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        code=code("variants_drop.py"),
    output:
        RESULTS.module_table("{variants}"),
    log:
        LOGS / "variants" / "{variants}" / "modules.log",
    wildcard_constraints:
        variants=any_of(DROPS),
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
    message:
        "Variants {wildcards.variants}: modules that may be dropped"
    shell:
        "{params.python:q} scripts/variants_drop.py {params.common:q} --name {wildcards.variants:q}"
        " --settings {params.settings:q} --log {log:q}"
