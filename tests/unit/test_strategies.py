"""Settings of searches, and the uniform strategy."""

import pytest
from toy_search import problem_of

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.config.base import parse_section
from evopress.search.engine.evaluator import require_tokens
from evopress.search.space import make_space
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.uniform import Uniform, uniform_candidate
from evopress.util.errors import ConfigError


def unit(name: str, parameters: int, bits: tuple[int, ...]) -> Unit:
    return Unit(name, 0, name, "all", parameters, tuple(Level(str(b), float(b), b * parameters, b) for b in bits))


def test_uniform_takes_the_target_level_everywhere():
    space = make_space(BITS, [unit("a", 10, (2, 3, 4)), unit("b", 7, (3, 4)), unit("c", 5, (3,))], 3, "searches.u")
    assert uniform_candidate(space, 3.0, "searches.u.target").tolist() == [1, 0, 0]


@pytest.mark.parametrize(("target", "nearest"), [(2.5, "2 or 3"), (3.9, "3 or 6")])
def test_uniform_offers_the_nearest_levels(target, nearest):
    space = make_space(BITS, [unit("model.layers.0.q", 10, (2, 3, 6))], target, "searches.u")
    with pytest.raises(ConfigError) as error:
        uniform_candidate(space, target, "searches.u.target")
    assert str(error.value) == (
        f"searches.u.target: {target:g} is not a level of model.layers.0.q; the nearest are {nearest}"
    )


def test_uniform_never_passes_the_budget():
    space = make_space(BITS, [unit("a", 10, (8,)), unit("b", 10, (2, 3, 4))], 5.2, "searches.u")
    with pytest.raises(ConfigError, match="is not a level of b"):
        uniform_candidate(space, 5.2, "searches.u.target")
    space = make_space(BITS, [unit("a", 10, (8,)), unit("b", 50, (2, 4, 6))], 4, "searches.u")
    with pytest.raises(ConfigError, match="exceeds the budget"):
        uniform_candidate(space, 4.0, "searches.u.target")


def evolution(**values) -> Evolution:
    base = {"strategy": "evolution", "variants": "gptq", "target": 3}
    return parse_section(Evolution, base | values, "searches.q3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"survivors": [2, 1]}, "searches.q3: survivors has 2 steps and tokens has 3"),
        ({"survivors": [4, 2], "tokens": [64, 128]}, "survivors must end in population (1"),
        ({"survivors": [], "tokens": []}, "survivors must end in population (1"),
        ({"survivors": [2, 4, 1]}, "survivors must not grow"),
        ({"survivors": [200, 4, 1]}, "keeps 200 of only 128 offspring"),
        ({"survivors": [4, 0, 1]}, "searches.q3.survivors.1"),
        ({"tokens": [0, 1, 2]}, "searches.q3.tokens.0"),
        ({"fitness": "perplexity", "tokens": [1, 16, 32]}, "needs at least 2"),
        ({"target": float("nan")}, "searches.q3.target"),
        ({"target": 0}, "searches.q3.target"),
        ({"generation": 3}, "did you mean 'generations'?"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError) as error:
        evolution(**values)
    assert message in str(error.value)


def test_an_unknown_key_of_uniform_is_refused():
    with pytest.raises(ConfigError, match="unknown key 'generations'"):
        parse_section(Uniform, {"variants": "g", "target": 3, "generations": 2}, "searches.u")


def test_more_tokens_than_the_text_has_are_refused_by_name():
    whole, mixed = (make_space(BITS, [unit("a", 10, (2, 3, 4))], target, "searches.q3") for target in (3, 3.5))
    settings = evolution(tokens=[512, 2048, 9000], initial_tokens=512)
    require_tokens(settings.tokens_asked(problem_of(whole)), 9000, "searches.q3")
    with pytest.raises(ConfigError) as error:
        require_tokens(settings.tokens_asked(problem_of(whole)), 8192, "searches.q3")
    assert str(error.value) == (
        "searches.q3.tokens[2]: asks for 9000 tokens, but the search text has 8192; "
        "lower it, or raise data.search.tokens"
    )
    few = evolution(tokens=[512, 512, 512])
    require_tokens(
        few.tokens_asked(problem_of(whole)), 600, "searches.q3"
    )  # starts uniform, so initial_tokens are not drawn
    with pytest.raises(ConfigError, match="initial_tokens: asks for 2048"):
        require_tokens(few.tokens_asked(problem_of(mixed)), 600, "searches.q3")
