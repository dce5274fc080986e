"""Text configurations: both formats read and written, adversarial text, and the check against a space."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_search import problem_of

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS, SPARSITY
from evopress.search.configuration import parse_candidate, require_budget
from evopress.search.space import Space, make_space
from evopress.search.strategies.imported import Imported
from evopress.search.text_format import DROPS, format_drops, format_levels, parse_drops, parse_levels, read_text, shown
from evopress.util.errors import ConfigError
from evopress.workflow.files import search_files

WHERE = "searches.mine.file: file.txt"
LAYERS = [f"model.layers.{block}.{layer}" for block in range(2) for layer in ("self_attn.q_proj", "mlp.up_proj")]

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}(\.[a-z0-9_]{1,8}){0,4}", fullmatch=True)
labels = st.one_of(
    st.integers(2, 8).map(str), st.integers(-8, 8).map(lambda steps: f"{steps:+d}" if steps else "0"), st.just("2:4")
)


def layer_space(labels: tuple[str, ...], target: float) -> Space:
    """Four layers of 100 weights each; +n prunes, n quantizes."""
    sparse = labels[0].startswith("-")
    units = []
    for name in LAYERS:
        values = [(0.5 + 0.01 * int(label)) if sparse else float(label) for label in labels]
        costs = [round((1 - value) * 100) if sparse else round(value * 100) for value in values]
        levels = [Level(*row, 10) for row in zip(labels, values, costs, strict=True)]
        levels.sort(key=lambda level: level.cost)
        block = int(name.split(".")[2])
        units.append(Unit(name, block, name.split(".", 3)[3], "all", 100, tuple(levels)))
    return make_space(SPARSITY if sparse else BITS, units, target, "searches.mine")


def bits(target: float = 3.0) -> Space:
    return layer_space(("2", "3", "4"), target)


def text_of(*levels: str) -> str:
    return format_levels(zip(LAYERS, levels, strict=True))


# Round trips


@given(st.dictionaries(names, labels, min_size=1))
def test_levels_survive_a_round_trip(levels):
    lines = parse_levels(format_levels(levels.items()), WHERE)
    assert [line.layer for line in lines] == list(levels)
    assert [line.level for line in lines] == [label.removeprefix("+") for label in levels.values()]
    assert [line.line for line in lines] == list(range(1, len(levels) + 1))


@given(st.lists(st.sampled_from(list(DROPS.values())), min_size=1))
def test_drops_survive_a_round_trip(dropped):
    assert parse_drops(format_drops(dropped), WHERE) == dropped


def test_the_formats_are_those_that_were_published():
    assert format_levels([("model.layers.0.self_attn.q_proj", "3"), ("a.b", "+2"), ("a.c", "-2")]) == (
        "model.layers.0.self_attn.q_proj: 3\na.b: 2\na.c: -2\n"
    )
    both = frozenset({"attn", "mlp"})
    assert format_drops([frozenset(), frozenset({"attn"}), frozenset({"mlp"}), both]) == "none\nattn\nmlp\nattn+mlp\n"


def test_what_editors_do_to_files_does_no_harm(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes("\ufeffmodel.a: 3\r\n\r\n  model.b :4  \r\n\r\n".encode())
    lines = parse_levels(read_text(path, "x"), WHERE)
    assert [(line.line, line.layer, line.level) for line in lines] == [(1, "model.a", "3"), (3, "model.b", "4")]
    path.write_bytes("\ufeffnone\r\nattn \r\n\r\n".encode())
    assert parse_drops(read_text(path, "x"), WHERE) == [frozenset(), frozenset({"attn"})]


def test_comments_say_nothing_but_count_as_lines():
    lines = parse_levels("# q3\nmodel.a: 3\n  # of b\nmodel.b: 4\n", WHERE)
    assert [(line.line, line.layer, line.level) for line in lines] == [(2, "model.a", "3"), (4, "model.b", "4")]
    assert parse_drops("# a quarter\nnone\n# here\nmlp\n", WHERE) == [frozenset(), frozenset({"mlp"})]
    with pytest.raises(ConfigError, match="line 3"):
        parse_drops("none\n# here\nboth\n", WHERE)


# Adversarial text


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="model. :+-0123456789\n\r\x00atnp\u2028"),
        st.binary().map(lambda b: b.decode("latin-1")),
    )
)
def test_any_text_is_read_or_refused_with_its_line(text):
    for parse in (parse_levels, parse_drops):
        try:
            assert len(parse(text, WHERE)) <= text.count("\n") + 1
        except ConfigError as error:
            message = str(error)
            assert message.startswith(f"{WHERE}, line ") and message.isprintable() and len(message) < 500
            line = int(message.removeprefix(f"{WHERE}, line ").partition(":")[0])
            assert 1 <= line <= text.count("\n") + 1


@given(st.text(), st.sampled_from(["bits", "sparsity"]))
def test_any_text_fits_a_space_or_is_refused(text, kind):
    space = bits() if kind == "bits" else layer_space(("-1", "0", "+1"), 0.5)
    with pytest.raises(ConfigError):
        parse_candidate(text, space, 2, WHERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: nothing is here"),
        ("a.b: 3\na.c: three\n", "line 2: 'a.c: three' is not of the form `layer.name: level`"),
        ("a.b: 3.0", "line 1: 'a.b: 3.0' is not of the form"),
        ("a.b: 1_0", "line 1"),
        ("a.b: \u0663", "line 1"),
        ("a.b: " + "9" * 5000, "line 1"),
        ("a.b", "line 1: 'a.b' is not of the form"),
        ("a.b: 3\n\na.b: 4\n", "line 3: 'a.b' has a level already, in line 1"),
        ("attn+mlp\n", "line 1: 'attn+mlp' says which modules a block loses"),
        ("x\x0by: 3", r"line 1: 'x\x0by: 3' is not"),
    ],
)
def test_bad_levels_name_their_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse_levels(text, WHERE)
    assert str(error.value).startswith(f"{WHERE}, {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none\natn\n", "line 2: 'atn': one of none, attn, mlp, attn+mlp says what the block loses"),
        ("none\n\nnone\n", "line 2: '': one of none, attn, mlp, attn+mlp says"),
        ("", "line 1: ''"),
        ("mlp+attn", "line 1: 'mlp+attn': one of none, attn, mlp, attn+mlp says"),
        ("none\na.b: 3\n", "line 2: 'a.b: 3': this is the format of levels"),
    ],
)
def test_bad_drops_name_their_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse_drops(text, WHERE)
    assert str(error.value).startswith(f"{WHERE}, {message}")


def test_files_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"model.a: 3\nmodel.b: \xff\n")
    with pytest.raises(ConfigError, match=r"searches\.mine\.file: .*file.txt, line 2: is no text in UTF-8"):
        read_text(path, "searches.mine.file")
    with pytest.raises(ConfigError, match="is no text configuration"):
        read_text(tmp_path, "searches.mine.file")
    with pytest.raises(ConfigError, match="is not there"):
        read_text(tmp_path / "none.txt", "searches.mine.file")
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="is no text configuration"):
        read_text(path, "searches.mine.file")


def test_the_workflow_takes_no_file_that_snakemake_would_look_for_elsewhere(tmp_path):
    path = tmp_path / "{block}.txt"
    path.write_text("a.b: 3\n")
    settings = Imported(variants="gptq", target=3, file=str(path))
    with pytest.raises(ConfigError, match="in a path literally"):
        search_files(settings, "searches.mine")
    assert search_files(settings.model_copy(update={"file": __file__}), "searches.mine") == [__file__]


def test_foreign_text_is_shown_in_one_short_line():
    assert len(shown("a\n" * 1000)) < 70 and "\n" not in shown("a\nb")


# Against a space


def test_levels_are_matched_by_name_in_any_order():
    candidate = parse_candidate(
        "".join(reversed(text_of("2", "3", "4", "3").splitlines(keepends=True))), bits(), 2, WHERE
    )
    assert candidate.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("spelling", ["{:+d}", "{:d}", "{:03d}"])
def test_steps_are_matched_however_they_are_spelt(spelling):
    space = layer_space(("-1", "0", "+1"), 0.5)
    steps = (1, -1, 0, 0)
    candidate = parse_candidate(text_of(*map(spelling.format, steps)), space, 2, WHERE)
    chosen = [unit.levels[level].label for unit, level in zip(space.units, candidate, strict=True)]
    assert chosen == ["+1", "-1", "0", "0"]
    require_budget(replace(problem_of(space), family=SPARSITY), candidate, 0.5, WHERE)


def test_an_unknown_layer_is_refused_with_the_nearest():
    text = text_of("3", "3", "3", "3").replace("layers.1.mlp.up_proj", "layers.1.mlp.up_pro")
    with pytest.raises(ConfigError) as error:
        parse_candidate(text, bits(), 2, WHERE)
    assert str(error.value) == (
        f"{WHERE}, line 4: no searched layer is named 'model.layers.1.mlp.up_pro': "
        "did you mean model.layers.1.mlp.up_proj?"
    )


def test_configurations_of_another_model_are_refused_in_a_few_lines():
    text = format_levels((f"transformer.h.{block}.attn.c_attn", "3") for block in range(40))
    with pytest.raises(ConfigError) as error:
        parse_candidate(text, bits(), 2, WHERE)
    lines = str(error.value).splitlines()
    assert len(lines) == 6 and lines[-1] == "... and 35 more" and "another model" in lines[0]


def test_missing_layers_are_named():
    with pytest.raises(ConfigError) as error:
        parse_candidate(format_levels([(LAYERS[0], "3")]), bits(), 2, WHERE)
    assert str(error.value).splitlines() == [f"{WHERE}: has no level for {name}" for name in LAYERS[1:]]


def test_levels_that_are_not_made_are_refused():
    with pytest.raises(ConfigError, match=r"line 2: model\.layers\.0\.mlp\.up_proj has no level 8; there are 2, 3, 4"):
        parse_candidate(text_of("3", "8", "3", "3"), bits(), 2, WHERE)
    with pytest.raises(ConfigError, match=r"line 1: .* has no level 2:4"):
        parse_candidate(text_of("2:4", "3", "3", "3"), bits(), 2, WHERE)


def test_too_many_bits_are_refused_by_how_many():
    candidate = parse_candidate(text_of("4", "3", "3", "3"), bits(), 2, WHERE)
    with pytest.raises(ConfigError, match=r"0\.25 bits per weight above the target of 3 \(100 bits in all\)"):
        require_budget(problem_of(bits()), candidate, 3.0, WHERE)
    require_budget(problem_of(bits(3.25)), candidate, 3.25, WHERE)


def test_too_little_sparsity_is_refused_by_how_much():
    space = layer_space(("-1", "0", "+1"), 0.5)
    candidate = parse_candidate(text_of("-1", "0", "0", "0"), space, 2, WHERE)
    with pytest.raises(ConfigError, match=r"0\.0025 short of the target of 0\.5 \(1 weights too many stay\)"):
        require_budget(replace(problem_of(space), family=SPARSITY), candidate, 0.5, WHERE)


def test_levels_do_not_serve_where_modules_are_dropped_and_the_other_way_round():
    with pytest.raises(ConfigError, match="line 1: 'none' says which modules a block loses"):
        parse_candidate("none\nnone\n", bits(), 2, WHERE)


def test_levels_of_one_candidate_come_back():
    space = bits()
    for seed in range(5):
        candidate = np.random.default_rng(seed).integers(0, 3, len(space.units)).astype(np.int16)
        levels = [(unit.name, unit.levels[level].label) for unit, level in zip(space.units, candidate, strict=True)]
        assert parse_candidate(format_levels(levels), space, 2, WHERE).tolist() == candidate.tolist()
