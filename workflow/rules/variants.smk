# Every linear layer of a block, compressed to every level: each block on its own, or one after the other in sequence.
# Of depth pruning, only the list of modules that may be dropped.

# Blocks of the jobs: any one, or, where a job makes several, those of each job.
JOBS = [BLOCKS[start : start + BLOCKS_PER_JOB] for start in range(0, len(BLOCKS), BLOCKS_PER_JOB)]
JOBS = JOBS if BLOCKS_PER_JOB > 1 else [["{block}"]]

for blocks in JOBS:

    rule:
        name:
            "variants" if BLOCKS_PER_JOB == 1 else f"variants_{blocks[0]}"
        input:
            RUN.model_manifest,
            RUN.layers,
            calibrated(blocks),
        output:
            [kept(RUN.variant_tensors("{variants}", block)) for block in blocks],
            [RUN.variant_table("{variants}", block) for block in blocks],
        log:
            RUN.variants_log("{variants}", blocks[0]),
        wildcard_constraints:
            block=r"\d+",
            variants=any_of(set(SETTINGS.variants) - set(SEQUENTIAL) - set(MODULES)),
        threads: threads_of_variants
        resources:
            gpu=gpus,
            mem_mb=memory_of_variants,
            runtime=minutes_of_variants,
        params:
            **SCRIPT,
            blocks=named(blocks),
            settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
            key=lambda wildcards: KEYS.variants(wildcards.variants),
        message:
            "Variants {wildcards.variants}: block {params.blocks}"
        shell:
            "{params.stage:q} variants {params.common:q} --key {params.key:q}"
            " --name {wildcards.variants:q} --blocks {params.blocks} --method {params.settings:q} --log {log:q}"


rule variants_embedding:
    input:
        RUN.model_manifest,
        calibrated_embedding,
    output:
        kept(RUN.variant_tensors("{variants}", EMBEDDING)),
        RUN.variant_table("{variants}", EMBEDDING),
    log:
        RUN.variants_log("{variants}", EMBEDDING),
    threads: threads_beside_others
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
        "{params.stage:q} variants_embedding {params.common:q} --key {params.key:q}"
        " --name {wildcards.variants:q} --method {params.settings:q} --log {log:q}"


for blocks in JOBS:

    rule:
        name:
            "variants_sequential" if BLOCKS_PER_JOB == 1 else f"variants_sequential_{blocks[0]}"
        input:
            RUN.model_manifest,
            RUN.layers,
            RUN.tokens("calibration"),
            state_before(blocks),
        output:
            [kept(RUN.variant_tensors("{variants}", block)) for block in blocks],
            [RUN.variant_table("{variants}", block) for block in blocks],
            [temp(RUN.chain_state("{variants}", block)) for block in blocks],
            [manifest_path(RUN.chain_state("{variants}", block)) for block in blocks],
        log:
            RUN.variants_log("{variants}", blocks[0]),
        wildcard_constraints:
            block=r"\d+",
            variants=any_of(SEQUENTIAL),
        threads: threads_of_sequence
        resources:
            gpu=gpus,
            mem_mb=memory_of_sequence,
            runtime=minutes_of_variants,
        params:
            **SCRIPT,
            blocks=named(blocks),
            settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
            key=lambda wildcards: KEYS.variants(wildcards.variants),
        message:
            "Variants {wildcards.variants}: block {params.blocks}, after those before it"
        shell:
            "{params.stage:q} variants_sequential {params.common:q} --key {params.key:q}"
            " --name {wildcards.variants:q} --blocks {params.blocks} --method {params.settings:q} --log {log:q}"


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
        "{params.stage:q} variants_modules {params.common:q} --key {params.key:q}"
        " --name {wildcards.variants:q} --method {params.settings:q} --log {log:q}"
