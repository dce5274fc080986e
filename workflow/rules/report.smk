# The comparison of all searches.


rule report:
    input:
        RUN.model_manifest,
        RUN.layers,
        [RUN.configuration(search) for search in SEARCHES],
        [RUN.trace(search) for search in SEARCHES],
        [RUN.progress(search) for search in SEARCHES],
        [RUN.export_manifest(search, one.exporter) for search in SEARCHES for one in EXPORTS[search]],
        [RUN.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RUN.tasks(model) for model in ON_TASKS],
        [RUN.runtime(model) for model in IN_RUNTIME],
        STUDY_SECTIONS,
        PEERS_TABLES if FRONTS else [],
    output:
        report(RUN.report, caption="../report/report.rst", category="Comparison"),
        report(RUN.summary, caption="../report/summary.rst", category="Comparison"),
    log:
        LOGS / "report.log",
    params:
        **SCRIPT,
        searches=SEARCHES,
        exports=[RUN.export(search, one.exporter) for search in SEARCHES for one in EXPORTS[search]],
        on_tasks=ON_TASKS,
        in_runtime=IN_RUNTIME,
        sections=STUDY_SECTIONS,
        fronts=FRONTS,
        peers=["--peers", *PEERS_TABLES] if FRONTS and PEERS_TABLES else [],
        config=written_settings,
        key=lambda wildcards: KEYS.report(),
    message:
        "Report"
    shell:
        "{params.stage:q} report {params.common:q} --key {params.key:q}"
        " --searches {params.searches:q} --exports {params.exports:q} --on-tasks {params.on_tasks:q}"
        " --in-runtime {params.in_runtime:q}"
        " --sections {params.sections:q} --fronts {params.fronts:q}"
        " {params.peers:q} --config {params.config:q} --log {log:q}"
