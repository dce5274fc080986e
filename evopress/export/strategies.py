"""How a model card says what chose the levels, with a link to the source of the method."""

from collections.abc import Mapping
from typing import Any

_ARXIV = "https://arxiv.org/abs/"
_CHOSEN = {
    "evolution": f"found by the evolutionary search of [EvoPress]({_ARXIV}2410.14649)",
    "uniform": "the same for every layer",
    "random": "the best of random draws, judged as a whole",
    "greedy": "found by a greedy descent on what each step costs the whole model",
    "owl": f"chosen by the outliers of each block ([OWL]({_ARXIV}2310.05175))",
    "brute": "the best of all possible choices of whole blocks on the search text",
    "imported": "read from a text file",
}
_DP = {
    "table": "chosen by dynamic programming to make the sum of the layers' own output errors least",
    "propagated": "chosen by dynamic programming to make least the sum of the errors that each alone leaves in the "
    "last hidden states",
}
_SCORES = {
    "cosine": f"chosen by how little their block turns hidden states ([ShortGPT]({_ARXIV}2403.03853))",
    "window_cosine": "chosen as those of the consecutive blocks that together turn hidden states least "
    f"([The Unreasonable Ineffectiveness of the Deeper Layers]({_ARXIV}2403.17887))",
    "norm_ratio": "chosen by how little their block adds to hidden states, relative to what leaves it "
    f"([weight subcloning]({_ARXIV}2312.09299))",
    "l2": "chosen by how little their block changes hidden states",
    "normalized_l2": "chosen by how little their block changes hidden states, relative to what enters it",
    "perplexity": f"chosen by the perplexity without their block ([Shortened Llama]({_ARXIV}2402.02834))",
    "kl": "chosen by the divergence from the original without their block",
}


def chosen_by(settings: Mapping[str, Any]) -> str:
    """End of a sentence on levels, or on dropped modules: what a search with these settings did."""
    strategy = str(settings.get("strategy"))
    if strategy == "dp":
        return _DP.get(str(settings.get("errors")), _DP["table"])
    if strategy == "scores":
        return _SCORES.get(str(settings.get("score")), _SCORES["cosine"])
    return _CHOSEN.get(strategy, f"found by the strategy {strategy}")
