# Held-out perplexity and KL, and lm-eval tasks, of the dense model and of every compressed one.

DENSE_HIDDEN = [RESULTS.dense_hidden(dataset) for dataset in EVALUATION_SETS]


rule perplexity_dense:
    input:
        RESULTS.model_manifest,
        [RESULTS.tokens(dataset) for dataset in EVALUATION_SETS],
        code=code("perplexity.py"),
    output:
        RESULTS.perplexity(DENSE),
        DENSE_HIDDEN,
        [manifest_path(hidden) for hidden in DENSE_HIDDEN],
    log:
        LOGS / "evaluation" / DENSE / "perplexity.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **SCRIPT,
        datasets=EVALUATION_SETS,
    message:
        "Perplexity of the dense model"
    shell:
        "{params.python:q} scripts/perplexity.py {params.common:q} --search dense"
        " --datasets {params.datasets:q} --log {log:q}"


rule perplexity:
    input:
        RESULTS.export_manifest("{search}", "huggingface"),
        [RESULTS.tokens(dataset) for dataset in EVALUATION_SETS],
        with_manifest(*DENSE_HIDDEN),
        code=code("perplexity.py"),
    output:
        RESULTS.perplexity("{search}"),
    log:
        LOGS / "evaluation" / "{search}" / "perplexity.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **SCRIPT,
        datasets=EVALUATION_SETS,
    message:
        "Perplexity of {wildcards.search}"
    shell:
        "{params.python:q} scripts/perplexity.py {params.common:q} --search {wildcards.search:q}"
        " --datasets {params.datasets:q} --log {log:q}"


rule tasks_dense:
    input:
        RESULTS.model_manifest,
        TASK_FILES,
        code=code("tasks.py"),
    output:
        RESULTS.tasks(DENSE),
        RESULTS.tasks_json(DENSE),
    log:
        LOGS / "evaluation" / DENSE / "tasks.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.tasks_slice(SETTINGS),
    message:
        "Tasks with the dense model"
    shell:
        "{params.python:q} scripts/tasks.py {params.common:q} --search dense"
        " --settings {params.settings:q} --log {log:q}"


rule tasks:
    input:
        RESULTS.export_manifest("{search}", "huggingface"),
        TASK_FILES,
        code=code("tasks.py"),
    output:
        RESULTS.tasks("{search}"),
        RESULTS.tasks_json("{search}"),
    log:
        LOGS / "evaluation" / "{search}" / "tasks.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.tasks_slice(SETTINGS),
    message:
        "Tasks with {wildcards.search}"
    shell:
        "{params.python:q} scripts/tasks.py {params.common:q} --search {wildcards.search:q}"
        " --settings {params.settings:q} --log {log:q}"
