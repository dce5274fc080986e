"""The stages of a run: the function that does each one's work, by name, so that nothing is imported to know it."""

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage."""

    module: str
    function: str
    """Takes a StageContext and what tells its jobs apart."""
    gpu: bool = False
    """Whether it runs on an accelerator where there is one."""


STAGES = {
    "model": Stage("evopress.models.sources", "prepare_model"),
    "tokens": Stage("evopress.data.tokens", "write_tokens"),
    "hessians": Stage("evopress.compression.hessian", "accumulate_hessians", gpu=True),
    "hessian_sum": Stage("evopress.compression.hessian", "sum_hessians"),
    "variants": Stage("evopress.compression.stage", "make_variants", gpu=True),
    "variants_embedding": Stage("evopress.compression.stage", "make_embedding_variants", gpu=True),
    "variants_sequential": Stage("evopress.compression.sequential", "make_sequential_variants", gpu=True),
    "variants_modules": Stage("evopress.compression.methods.drop", "make_module_table"),
    "effects": Stage("evopress.search.effects", "measure_effects", gpu=True),
    "search": Stage("evopress.search.run", "run_search", gpu=True),
    "polish": Stage("evopress.search.polish", "polish", gpu=True),
    "export": Stage("evopress.export.stage", "run_export"),
    "perplexity": Stage("evopress.evaluation.perplexity", "evaluate_perplexity", gpu=True),
    "tasks": Stage("evopress.evaluation.tasks", "evaluate_tasks", gpu=True),
    "runtime": Stage("evopress.evaluation.runtime", "evaluate_runtime", gpu=True),
    "card": Stage("evopress.export.card", "write_card"),
    "report": Stage("evopress.report.page", "write_report"),
}
