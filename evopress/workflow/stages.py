"""The stages of a run: the function that does each one's work, by name, so that nothing is imported to know it."""

STAGES = {
    "model": "evopress.models.sources:prepare_model",
    "tokens": "evopress.data.tokens:write_tokens",
    "hessians": "evopress.compression.hessian:accumulate_hessians",
    "hessian_sum": "evopress.compression.hessian:sum_hessians",
    "variants": "evopress.compression.variants:make_variants",
    "variants_chain": "evopress.compression.chain:make_chained_variants",
    "variants_drop": "evopress.compression.drop:make_module_table",
    "search": "evopress.search.run:run_search",
    "stitch": "evopress.export.run:stitch_model",
    "archive": "evopress.export.archive:write_archive",
    "decilm": "evopress.export.decilm:write_decilm",
    "card": "evopress.export.card:write_card",
    "perplexity": "evopress.evaluation.perplexity:evaluate_perplexity",
    "tasks": "evopress.evaluation.tasks:evaluate_tasks",
    "report": "evopress.report.page:write_report",
}
"""Module and function of each stage."""


def module_of(stage: str) -> str:
    """Dotted name of the module in which a stage's function lies."""
    return STAGES[stage].partition(":")[0]
