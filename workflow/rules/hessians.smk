# Hessians of the linear layers' inputs: one job over all calibration tokens, or one per shard and a sum per block.

SHARDS = SETTINGS.hessians.shards
HESSIAN_FILES = RUN.hessian if SHARDS == 1 else lambda block: RUN.hessian_shard("{shard}", block)
KEPT = kept if SETTINGS.hessians.keep else removed_after_use


rule hessians:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("calibration"),
    output:
        [(KEPT if SHARDS == 1 else removed_after_use)(HESSIAN_FILES(block)) for block in [*BLOCKS, EMBEDDING]],
    log:
        LOGS / "hessians" / ("shard_0.log" if SHARDS == 1 else "shard_{shard}.log"),
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_hessians,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.hessians_slice(SETTINGS),
        shard=lambda wildcards: wildcards.get("shard", 0),
        key=lambda wildcards: KEYS.hessians(),
    message:
        "Hessians"
    shell:
        "{params.stage:q} hessians {params.common:q} --key {params.key:q} --shard {params.shard}"
        " --settings {params.settings:q} --log {log:q}"


if SHARDS > 1:

    rule hessian_sum:
        input:
            with_manifest(*(RUN.hessian_shard(shard, "{block}") for shard in range(SHARDS))),
        output:
            KEPT(RUN.hessian("{block}")),
        log:
            LOGS / "hessians" / "block_{block}.log",
        params:
            **SCRIPT,
            shards=SHARDS,
            key=lambda wildcards: KEYS.hessians(),
        message:
            "Hessians of block {wildcards.block}: sum of shards"
        shell:
            "{params.stage:q} hessian_sum {params.common:q} --key {params.key:q}"
            " --block {wildcards.block} --shards {params.shards} --log {log:q}"
