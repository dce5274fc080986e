# The comparison of all searches.


rule report:
    input:
        RUN.model_manifest,
        RUN.layers,
        [RUN.configuration(search) for search in SEARCHES],
        [RUN.trace(search) for search in SEARCHES],
        [RUN.export_manifest(search, one.exporter) for search in SEARCHES for one in EXPORTS[search]],
        [RUN.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RUN.tasks(search) for search in [DENSE, *SEARCHES]],
        [RUN.runtime(model) for model in IN_RUNTIME],
        STUDY_SECTIONS,
    output:
        RUN.report,
        RUN.summary,
    log:
        LOGS / "report.log",
    params:
        **SCRIPT,
        searches=SEARCHES,
        exports=[RUN.export(search, one.exporter) for search in SEARCHES for one in EXPORTS[search]],
        in_runtime=IN_RUNTIME,
        sections=STUDY_SECTIONS,
        key=lambda wildcards: KEYS.report(),
    message:
        "Report"
    shell:
        "{params.python:q} scripts/stage.py report {params.common:q} --key {params.key:q}"
        " --searches {params.searches:q} --exports {params.exports:q} --in-runtime {params.in_runtime:q}"
        " --sections {params.sections:q} --log {log:q}"
