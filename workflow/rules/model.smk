# The dense model, whatever its source, as a Hugging Face folder.


rule model:
    input:
        MODEL_FILES,
    output:
        RUN.model_manifest,
        RUN.layers,
    log:
        LOGS / "model.log",
    resources:
        mem_mb=lambda wildcards, attempt: MEMORY.model(attempt),
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.model_slice(SETTINGS),
        blocks=len(BLOCKS),
        files=MODEL_FILES,  # one that leaves changes no other's time
        key=lambda wildcards: KEYS.model(),
    message:
        "Fetching the model"
    shell:
        "{params.stage:q} model {params.common:q} --key {params.key:q}"
        " --settings {params.settings:q} --blocks {params.blocks} --log {log:q}"
