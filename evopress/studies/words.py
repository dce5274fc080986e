"""What the tables of studies come to, as rows of short texts for the terminal and the report."""

import math

import pandas as pd

from evopress.studies.convergence import fits
from evopress.studies.monotonicity import ERRORS, KEPT, rank_correlation

Rows = list[list[str]]
"""The first row names the columns."""
CLAIMS = {ERRORS: "less summed error", KEPT: "strictly more kept"}


def convergence_rows(table: pd.DataFrame) -> Rows:
    """One row for each kind of mutation.

    Args:
        table: columns of CONVERGENCE.
    """
    header = ["switches", "cases", "slope", "R²", "exponent"]
    return [
        header,
        *(
            [fit["switches"], f"{fit['cases']}", f"{fit['slope']:.2f}", f"{fit['r2']:.3f}", f"{fit['exponent']:.2f}"]
            for fit in fits(table).to_dict("records")
        ),
    ]


def monotonicity_rows(pairs: pd.DataFrame, fitness: str) -> Rows:
    """One row for each pair that was judged again, the clearest first.

    Args:
        pairs: columns of MONOTONICITY_PAIRS.
        fitness: of the study.
    """
    header = ["should be better by", "candidates", "errors", f"{measured(fitness)}", "worse by", "t", "confirmed"]
    return [
        header,
        *(
            [
                CLAIMS[pair["claim"]],
                f"{pair['favoured']}, {pair['other']}",
                f"{pair['favoured_error']:.4g}, {pair['other_error']:.4g}",
                f"{value(pair['favoured_fitness'], fitness):.4g}, {value(pair['other_fitness'], fitness):.4g}",
                f"{pair['difference']:.4f} ±{pair['stderr']:.4f}",
                f"{pair['t']:.1f}",
                "yes" if pair["confirmed"] else "no",
            ]
            for pair in pairs.to_dict("records")
        ),
    ]


def monotonicity_findings(candidates: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """One sentence: how well summed errors rank candidates, and how many pairs speak against each claim."""
    free = int((candidates["base"] < 0).sum())
    counts = []
    for claim, words in CLAIMS.items():
        judged = pairs[pairs["claim"] == claim]
        counts.append(f"{int(judged['confirmed'].sum())} of {len(judged)} pairs of {words} confirmed as worse")
    correlation = (
        f"Rank correlation of summed error and fitness over {free} candidates: {rank_correlation(candidates):.2f}"
    )
    return f"{correlation}. {'; '.join(counts)}."


def measured(fitness: str) -> str:
    """What the values of a fitness function are shown as."""
    return "perplexity" if fitness == "perplexity" else "KL"


def value(mean: float, fitness: str) -> float:
    """A mean fitness as it is shown; that of perplexity is its logarithm."""
    return math.exp(mean) if fitness == "perplexity" else mean
