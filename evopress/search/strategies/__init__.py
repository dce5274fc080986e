"""Ways to turn variants into a configuration."""

from evopress.config.plugins import Registry
from evopress.search.settings import (
    BruteSettings,
    DpSettings,
    EvolutionSettings,
    GreedySettings,
    ImportedSettings,
    OwlSettings,
    RandomSettings,
    ScoresSettings,
    Strategy,
    UniformSettings,
)

STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    Strategy,
    UniformSettings,
    EvolutionSettings,
    RandomSettings,
    GreedySettings,
    DpSettings,
    OwlSettings,
    ScoresSettings,
    BruteSettings,
    ImportedSettings,
)
"""By `strategy` in the settings of a search."""
