"""Ways to turn variants into a configuration."""

from evopress.config.plugins import Registry
from evopress.search.base import Strategy
from evopress.search.strategies.auto import Auto
from evopress.search.strategies.brute import BruteForce
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.front import Front
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.imported import Imported
from evopress.search.strategies.owl import Owl
from evopress.search.strategies.random import RandomSearch
from evopress.search.strategies.scores import BlockScores
from evopress.search.strategies.uniform import Uniform

STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    Strategy,
    Auto,
    Uniform,
    Evolution,
    Front,
    RandomSearch,
    Greedy,
    DynamicProgramming,
    Owl,
    BlockScores,
    BruteForce,
    Imported,
    default=Auto,
)
"""By `strategy` in the settings of a search."""
