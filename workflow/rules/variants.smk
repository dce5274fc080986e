# Every linear layer of a block, compressed to every level.


rule variants:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        with_manifest(RESULTS.hessian("{block}")),
        code=code("variants.py"),
    output:
        RESULTS.variant_tensors("{variants}", "{block}"),
        manifest_path(RESULTS.variant_tensors("{variants}", "{block}")),
        RESULTS.variant_table("{variants}", "{block}"),
    log:
        LOGS / "variants" / "{variants}" / "block_{block}.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.variants_slice(SETTINGS, wildcards.variants),
    message:
        "Variants {wildcards.variants}: block {wildcards.block}"
    shell:
        "{params.python:q} scripts/variants.py {params.common:q} --name {wildcards.variants:q}"
        " --block {wildcards.block} --settings {params.settings:q} --log {log:q}"
