# The dense model, whatever its source, as a Hugging Face folder.


rule model:
    input:
        MODEL_FILES,
        code=code("model.py"),
    output:
        RESULTS.model_manifest,
        RESULTS.layers,
    log:
        LOGS / "model.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.model_slice(SETTINGS),
        blocks=len(BLOCKS),
    message:
        "Fetching the model"
    shell:
        "{params.python:q} scripts/model.py {params.common:q} --settings {params.settings:q} "
        " --blocks {params.blocks} --log {log:q}"
