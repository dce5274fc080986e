# What the method claims, each with a target of its own and a config under config/studies/. Searches with several seeds,
# and the studies that the settings name, are part of the report as well. The code is in workflow/studies/.

from studies.paths import (
    candidates_path,
    comparison_path,
    convergence_path,
    dense_gguf_path,
    imatrix_path,
    pairs_path,
    peer_file_path,
    peer_path,
    peers_path,
    rival_path,
    sections_path,
    text_path,
)
from studies.run import (
    comparison_slice,
    convergence_slice,
    monotonicity_slice,
    peer_slice,
    peers_slice,
    reported_studies,
    study_key,
)

STUDIES = reported_studies(SETTINGS)
COMPARISON = comparison_path(RUN)
CONVERGENCE_TABLES = [convergence_path(RUN)] if STUDIES.convergence else []
MONOTONICITY_TABLES = [pairs_path(RUN, study) for study in STUDIES.monotonicity]
PEERS = SETTINGS.studies.peers.peers() if STUDIES.peers else {}
AGAINST = SETTINGS.studies.peers.against if STUDIES.peers else None
PEERS_TABLES = [peers_path(RUN)] if STUDIES.peers else []
PEERS_READ = [peer_path(RUN, peer) for peer in PEERS] + [rival_path(RUN, peer) for peer in PEERS if AGAINST]
QUANTIZER = SETTINGS.studies.peers.quantizer if STUDIES.peers else None
STUDY_TABLES = [
    *([COMPARISON] if STUDIES.groups else []),
    *CONVERGENCE_TABLES,
    *MONOTONICITY_TABLES,
    *PEERS_TABLES,
    *(candidates_path(RUN, study) for study in STUDIES.monotonicity),
]
STUDY_TEXTS = [text_path(table) for table in [*CONVERGENCE_TABLES, *MONOTONICITY_TABLES, *PEERS_TABLES]]
STUDY_SECTIONS = [sections_path(RUN)] if STUDY_TABLES else []


wildcard_constraints:
    study=any_of(STUDIES.monotonicity),
    peer=any_of(PEERS),


# The last three are comparisons of searches that differ in one respect.
for target in ["comparison", "mutation", "fitness", "steps"]:

    rule:
        name:
            target
        input:
            studied([COMPARISON] if SEARCHES else [], "searches"),


rule monotonicity:
    input:
        studied(MONOTONICITY_TABLES, "studies.monotonicity"),


rule convergence:
    # Without the report, which would fetch and measure a model.
    input:
        studied(CONVERGENCE_TABLES, "studies.convergence", reported=False),


rule peers:
    input:
        studied(PEERS_TABLES, "studies.peers"),


rule study_comparison:
    input:
        RUN.model_manifest,
        [RUN.configuration(search) for search in SEARCHES],
        [RUN.effort(search) for search in SEARCHES],
        [RUN.perplexity(search) for search in [DENSE, *SEARCHES]],
        [RUN.tasks(model) for model in ON_TASKS],
    output:
        COMPARISON,
        report(text_path(COMPARISON), caption="../report/study.rst", category="Studies"),
    log:
        LOGS / "studies" / "comparison.log",
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "comparison"),
        settings=lambda wildcards: comparison_slice(SETTINGS),
        on_tasks=ON_TASKS,
    message:
        "Comparison of searches over their seeds"
    shell:
        "{params.study:q} comparison {params.common:q} --key {params.key:q} --settings {params.settings:q}"
        " --on-tasks {params.on_tasks:q} --log {log:q}"


rule study_convergence:
    output:
        convergence_path(RUN),
        report(text_path(convergence_path(RUN)), caption="../report/study.rst", category="Studies"),
    log:
        LOGS / "studies" / "convergence.log",
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "convergence"),
        settings=lambda wildcards: convergence_slice(SETTINGS),
    message:
        "Convergence on linear objectives"
    shell:
        "{params.study:q} convergence {params.common:q} --key {params.key:q} --settings {params.settings:q} --log {log:q}"


rule study_monotonicity:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("search"),
        lambda wildcards: variants_input(SETTINGS.studies.monotonicity[wildcards.study].variants),
    output:
        candidates_path(RUN, "{study}"),
        pairs_path(RUN, "{study}"),
        report(text_path(pairs_path(RUN, "{study}")), caption="../report/study.rst", category="Studies"),
    log:
        LOGS / "studies" / "monotonicity_{study}.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_study,
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "monotonicity", wildcards.study),
        settings=lambda wildcards: monotonicity_slice(SETTINGS, wildcards.study),
    message:
        "Monotonicity: {wildcards.study}"
    shell:
        "{params.study:q} monotonicity {params.common:q} --key {params.key:q} --name {wildcards.study:q}"
        " --settings {params.settings:q} --log {log:q}"


rule study_peer_sources:
    input:
        RUN.model_manifest,
        RUN.layers,
        with_manifest(*(RUN.hessian(block) for block in BLOCKS)),
    output:
        dense_gguf_path(RUN),
        imatrix_path(RUN),
        imatrix_path(RUN).with_suffix(".dat"),
    log:
        LOGS / "studies" / "peer_sources.log",
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "peer_sources"),
    message:
        "Dense model and importances for llama.cpp's quantizer"
    shell:
        "{params.study:q} peer_sources {params.common:q} --key {params.key:q} --log {log:q}"


rule study_peer_file:
    input:
        dense_gguf_path(RUN),
        imatrix_path(RUN),
        imatrix_path(RUN).with_suffix(".dat"),
        [QUANTIZER] if QUANTIZER and os.path.isfile(QUANTIZER) else [],
    output:
        peer_file_path(RUN, "{peer}"),
    log:
        LOGS / "studies" / "peer_file_{peer}.log",
    threads: MANY_THREADS
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "peer_file", wildcards.peer),
        peer=lambda wildcards: peer_slice(SETTINGS, wildcards.peer),
    message:
        "llama.cpp's quantizer: {wildcards.peer}"
    shell:
        "{params.study:q} peer_file {params.common:q} --key {params.key:q} --peer {params.peer:q}" " --log {log:q}"


rule study_peer:
    input:
        RUN.model_manifest,
        peer_file_path(RUN, "{peer}"),
        [RUN.tokens(dataset) for dataset in EVALUATION_SETS],
        with_manifest(*DENSE_HIDDEN),
    output:
        peer_path(RUN, "{peer}"),
    log:
        LOGS / "studies" / "peer_{peer}.log",
    threads: MANY_THREADS
    resources:
        gpu=gpus,
        mem_mb=memory_of_evaluation,
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "peer", wildcards.peer),
        peer=lambda wildcards: peer_slice(SETTINGS, wildcards.peer),
        datasets=EVALUATION_SETS,
    message:
        "Perplexity of llama.cpp's {wildcards.peer}"
    shell:
        "{params.study:q} peer {params.common:q} --key {params.key:q} --peer {params.peer:q}"
        " --datasets {params.datasets:q} --log {log:q}"


rule study_peer_search:
    input:
        RUN.model_manifest,
        RUN.layers,
        RUN.tokens("search"),
        lambda wildcards: [path for one in SETTINGS.searches[AGAINST].sources for path in variants_input(one)],
        lambda wildcards: effects_input(SETTINGS.searches[AGAINST]),
        [RUN.tokens(dataset) for dataset in EVALUATION_SETS],
        with_manifest(*DENSE_HIDDEN),
        dense_gguf_path(RUN),
        peer_path(RUN, "{peer}"),
    output:
        rival_path(RUN, "{peer}"),
    log:
        LOGS / "studies" / "peer_search_{peer}.log",
    threads: MANY_THREADS
    resources:
        gpu=lambda wildcards: devices_of_search(SETTINGS.searches[AGAINST], SETTINGS.compute),
        mem_mb=lambda wildcards, attempt: MEMORY.search(AGAINST, attempt),
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "peer_search", wildcards.peer),
        peer=lambda wildcards: peer_slice(SETTINGS, wildcards.peer),
        name=AGAINST,
        search=lambda wildcards: slices.search_slice(SETTINGS, AGAINST),
        exporter=lambda wildcards: SETTINGS.exporter_of(AGAINST, "gguf").model_dump_json(),
        datasets=EVALUATION_SETS,
    message:
        "Search at the size of llama.cpp's {wildcards.peer}"
    shell:
        "{params.study:q} peer_search {params.common:q} --key {params.key:q} --peer {params.peer:q}"
        " --name {params.name:q} --search {params.search:q} --exporter {params.exporter:q}"
        " --datasets {params.datasets:q} --log {log:q}"


rule study_peers:
    input:
        RUN.model_manifest,
        PEERS_READ,
    output:
        peers_path(RUN),
        report(text_path(peers_path(RUN)), caption="../report/study.rst", category="Studies"),
    log:
        LOGS / "studies" / "peers.log",
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "peers"),
        peers=list(PEERS),
        against=["--against", AGAINST] if AGAINST else [],
    message:
        "Files of llama.cpp's quantizer, and searches at their sizes"
    shell:
        "{params.study:q} peers {params.common:q} --key {params.key:q} --peers {params.peers:q}"
        " {params.against:q} --log {log:q}"


rule study_report:
    input:
        RUN.model_manifest,
        STUDY_TABLES,
        [RUN.configuration(search) for members in STUDIES.groups.values() for search in members],
        [RUN.trace(search) for members in STUDIES.groups.values() for search in members],
    output:
        sections_path(RUN),
    log:
        LOGS / "studies" / "report.log",
    params:
        **STUDY,
        key=lambda wildcards: study_key(KEYS, SETTINGS, "report"),
        settings=lambda wildcards: STUDIES.model_dump_json(),
    message:
        "Studies for the report"
    shell:
        "{params.study:q} report {params.common:q} --key {params.key:q} --settings {params.settings:q} --log {log:q}"
