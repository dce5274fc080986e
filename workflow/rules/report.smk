# The comparison of all searches.


rule report:
    input:
        RESULTS.model_manifest,
        RESULTS.layers,
        [RESULTS.configuration(search) for search in SEARCHES],
        [RESULTS.trace(search) for search in SEARCHES],
        [RESULTS.export_manifest(search, "huggingface") for search in SEARCHES],
        [RESULTS.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RESULTS.tasks(search) for search in [DENSE, *SEARCHES]],
        STUDY_SECTIONS,
        code=code("report.py"),
    output:
        RESULTS.report,
        RESULTS.summary,
    log:
        LOGS / "report.log",
    params:
        **SCRIPT,
        searches=SEARCHES,
        sections=STUDY_SECTIONS,
    message:
        "Report"
    shell:
        "{params.python:q} scripts/report.py {params.common:q} --searches {params.searches:q}"
        " --sections {params.sections:q} --log {log:q}"
