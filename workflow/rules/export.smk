# The compressed model of each search, in every form that the search asks for.


wildcard_constraints:
    exporter=any_of(EXPORTERS.names),


rule export:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.configuration("{search}"),
        searched_variants,
        polished,
        exports_read,
    output:
        RUN.export_manifest("{search}", "{exporter}"),
    log:
        LOGS / "export" / "{search}_{exporter}.log",
    params:
        **SCRIPT,
        settings=lambda wildcards: exporter_of(wildcards).model_dump_json(),
        polish=lambda wildcards: SETTINGS.searches[wildcards.search].polish,
        key=lambda wildcards: KEYS.export(wildcards.search, wildcards.exporter),
    message:
        "Model of {wildcards.search}: {wildcards.exporter}"
    shell:
        "{params.stage:q} export {params.common:q} --key {params.key:q}"
        " --search {wildcards.search:q} --exporter {params.settings:q} --polish {params.polish:q} --log {log:q}"


rule card:
    input:
        RUN.layers,
        RUN.export_manifest("{search}", "{exporter}"),
        RUN.configuration("{search}"),
        RUN.perplexity("{search}"),
        RUN.perplexity(DENSE),
        runtime_of,
    output:
        RUN.card("{search}", "{exporter}"),
        report(
            RUN.level_map("{search}", "{exporter}"),
            caption="../report/levels.rst",
            category="Levels",
            labels={"search": "{search}", "export": "{exporter}"},
        ),
    log:
        LOGS / "card" / "{search}_{exporter}.log",
    params:
        **SCRIPT,
        exporter=lambda wildcards: exporter_of(wildcards).model_dump_json(),
        settings=slices.card_slice(SETTINGS),
        key=lambda wildcards: KEYS.card(wildcards.search, wildcards.exporter),
    message:
        "Model card of {wildcards.search}: {wildcards.exporter}"
    shell:
        "{params.stage:q} card {params.common:q} --key {params.key:q}"
        " --search {wildcards.search:q} --exporter {params.exporter:q} --settings {params.settings:q} --log {log:q}"


rule archives:
    # Opt-in: `snakemake archives` writes every compressed model packed, in one file each.
    input:
        [RUN.export_manifest(search, "archive") for search in SEARCHES],


rule decilm:
    # Opt-in: `snakemake decilm` writes every model that lost modules in the layout in which vLLM runs it.
    input:
        [RUN.card(search, "decilm") for search in SEARCHES if set(SETTINGS.searches[search].sources) & set(MODULES)],
