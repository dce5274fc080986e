"""How far a search has come by the tokens that it has spent, from its trace."""

import pandas as pd


def best_so_far(trace: pd.DataFrame) -> pd.DataFrame:
    """Least fitness of the accepted candidates up to each generation, by the tokens judged until its end.

    Fitness is that of the last selection step, where the parent has part; starts that were compared on less text are
    passed over. Where the last step sees the whole search text, all values are on the same tokens; otherwise a lucky
    draw of tokens shows as progress.

    Args:
        trace: columns of TRACE.

    Returns:
        Columns generation, tokens, best: one row for each generation that accepted a candidate.
    """
    spent = trace.groupby("generation")["tokens"].sum().cumsum()
    accepted = trace[trace["accepted"]]
    text = accepted["sequences"].map(len)
    best = accepted[text == text.max()].groupby("generation")["fitness"].min().cummin()
    curve = best.rename("best").reset_index()
    curve["tokens"] = curve["generation"].map(spent)
    return curve[["generation", "tokens", "best"]]
