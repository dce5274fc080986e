# Held-out perplexity and KL, and lm-eval tasks, of the dense model and of every compressed one; GGUF files in llama.cpp.

DENSE_HIDDEN = [RUN.dense_hidden(dataset) for dataset in EVALUATION_SETS]


rule perplexity_dense:
    input:
        RUN.model_manifest,
        [RUN.tokens(dataset) for dataset in EVALUATION_SETS],
    output:
        report(
            RUN.perplexity(DENSE),
            caption="../report/perplexity.rst",
            category="Tables",
            labels={"table": "held-out text", "model": DENSE},
        ),
        DENSE_HIDDEN,
        [manifest_path(hidden) for hidden in DENSE_HIDDEN],
    log:
        LOGS / "evaluation" / DENSE / "perplexity.log",
    threads: threads_beside_others
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **SCRIPT,
        datasets=EVALUATION_SETS,
        key=lambda wildcards: KEYS.evaluation("perplexity", DENSE),
    message:
        "Perplexity of the dense model"
    shell:
        "{params.stage:q} perplexity {params.common:q} --key {params.key:q}"
        " --search dense --datasets {params.datasets:q} --log {log:q}"


rule perplexity:
    input:
        model_of,
        [RUN.tokens(dataset) for dataset in EVALUATION_SETS],
        with_manifest(*DENSE_HIDDEN),
    output:
        report(
            RUN.perplexity("{search}"),
            caption="../report/perplexity.rst",
            category="Tables",
            labels={"table": "held-out text", "model": "{search}"},
        ),
    log:
        LOGS / "evaluation" / "{search}" / "perplexity.log",
    threads: threads_beside_others
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **SCRIPT,
        datasets=EVALUATION_SETS,
        key=lambda wildcards: KEYS.evaluation("perplexity", wildcards.search),
    message:
        "Perplexity of {wildcards.search}"
    shell:
        "{params.stage:q} perplexity {params.common:q} --key {params.key:q}"
        " --search {wildcards.search:q} --datasets {params.datasets:q} --log {log:q}"


rule tasks_dense:
    input:
        RUN.model_manifest,
        TASK_FILES,
    output:
        RUN.tasks(DENSE),
        RUN.tasks_json(DENSE),
    log:
        LOGS / "evaluation" / DENSE / "tasks.log",
    threads: threads_beside_others
    resources:
        gpu=gpus,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.tasks_slice(SETTINGS),
        files=TASK_FILES,  # one that leaves changes no other's time
        key=lambda wildcards: KEYS.evaluation("tasks", DENSE),
    message:
        "Tasks with the dense model"
    shell:
        "{params.stage:q} tasks {params.common:q} --key {params.key:q}"
        " --search dense --settings {params.settings:q} --log {log:q}"


rule tasks:
    input:
        model_of,
        TASK_FILES,
    output:
        RUN.tasks("{search}"),
        RUN.tasks_json("{search}"),
    log:
        LOGS / "evaluation" / "{search}" / "tasks.log",
    threads: threads_beside_others
    resources:
        gpu=gpus,
    params:
        **SCRIPT,
        settings=lambda wildcards: slices.tasks_slice(SETTINGS),
        files=TASK_FILES,  # one that leaves changes no other's time
        key=lambda wildcards: KEYS.evaluation("tasks", wildcards.search),
    message:
        "Tasks with {wildcards.search}"
    shell:
        "{params.stage:q} tasks {params.common:q} --key {params.key:q}"
        " --search {wildcards.search:q} --settings {params.settings:q} --log {log:q}"


rule runtime_dense:
    input:
        RUN.model_manifest,
        [RUN.tokens(dataset) for dataset in EVALUATION_SETS],
    output:
        RUN.runtime(DENSE),
    log:
        LOGS / "evaluation" / DENSE / "runtime.log",
    threads: ALL_THREADS  # as `runtime`
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **SCRIPT,
        datasets=EVALUATION_SETS,
        settings=lambda wildcards: slices.runtime_slice(SETTINGS),
        key=lambda wildcards: KEYS.evaluation("runtime", DENSE),
    message:
        "The dense model in llama.cpp"
    shell:
        "{params.stage:q} runtime {params.common:q} --key {params.key:q}"
        " --search dense --datasets {params.datasets:q} --settings {params.settings:q} --log {log:q}"


rule runtime:
    input:
        RUN.model_manifest,
        model_of,
        RUN.export_manifest("{search}", "gguf"),
        [RUN.tokens(dataset) for dataset in EVALUATION_SETS],
    output:
        RUN.runtime("{search}"),
    log:
        LOGS / "evaluation" / "{search}" / "runtime.log",
    threads: ALL_THREADS  # so that it runs alone: what else the machine does would slow it down
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **SCRIPT,
        datasets=EVALUATION_SETS,
        settings=lambda wildcards: slices.runtime_slice(SETTINGS),
        key=lambda wildcards: KEYS.evaluation("runtime", wildcards.search),
    message:
        "{wildcards.search} in llama.cpp"
    shell:
        "{params.stage:q} runtime {params.common:q} --key {params.key:q}"
        " --search {wildcards.search:q} --datasets {params.datasets:q} --settings {params.settings:q} --log {log:q}"
