# Hessians of the linear layers' inputs: one job over all calibration tokens, or one per shard and a sum per block.

SHARDS = SETTINGS.hessians.shards
HESSIAN_FILES = RESULTS.hessian if SHARDS == 1 else lambda block: RESULTS.hessian_shard("{shard}", block)
KEPT = kept if SETTINGS.hessians.keep else removed_after_use


rule hessians:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        RESULTS.tokens("calibration"),
        code=code("hessians.py"),
    output:
        [(KEPT if SHARDS == 1 else removed_after_use)(HESSIAN_FILES(block)) for block in BLOCKS],
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
    message:
        "Hessians"
    shell:
        "{params.python:q} scripts/hessians.py {params.common:q} --shard {params.shard}"
        " --settings {params.settings:q} --log {log:q}"


if SHARDS > 1:

    rule hessian_sum:
        input:
            with_manifest(*(RESULTS.hessian_shard(shard, "{block}") for shard in range(SHARDS))),
            code=code("hessian_sum.py"),
        output:
            KEPT(RESULTS.hessian("{block}")),
        log:
            LOGS / "hessians" / "block_{block}.log",
        params:
            **SCRIPT,
            shards=SHARDS,
        message:
            "Hessians of block {wildcards.block}: sum of shards"
        shell:
            "{params.python:q} scripts/hessian_sum.py {params.common:q} --block {wildcards.block}"
            " --shards {params.shards} --log {log:q}"
