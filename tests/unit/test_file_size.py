"""Embedding and head have levels, and a target may be the size of the file: it is met, and holds what was judged."""

import json
import re
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from depth_run import write_depth_model
from finished_run import write_tokens
from gguf_layouts import byte_level, tiny
from transformers import AutoModelForCausalLM

from evopress.artifacts.paths import EMBEDDING, Run
from evopress.artifacts.tables import CONFIGURATION, read_table
from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.compression.hessian import accumulate_hessians
from evopress.compression.methods.gguf import Gguf
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import make_embedding_variants, make_variants
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import HessianSettings
from evopress.config.model import FolderModel
from evopress.export.card import write_card
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.models.checkpoint import Checkpoint
from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_weights import read_tensor
from evopress.plan.shape import file_of, shape_of, uncounted
from evopress.plan.text import describe_model
from evopress.search.base import Fitness, Polish
from evopress.search.configuration import Configuration, parse_candidate
from evopress.search.engine.evaluator import open_evaluator, search_text
from evopress.search.evaluation import Minibatch
from evopress.search.polish import polish
from evopress.search.run import open_problem, run_search
from evopress.search.space import DENSE_LEVEL
from evopress.search.strategies import STRATEGIES
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.uniform import Uniform
from evopress.search.target import FileFacts, SizeTarget, size_budgets, target_text
from evopress.util.errors import ConfigError
from evopress.workflow.searches import with_file

COMPUTE = ComputeSettings(device="cpu", memory_gb=0.1)
METHOD = Gguf(types=("Q4_0", "Q5_0", "Q8_0"))
SMALL = {
    "generations": 2,
    "offspring": 4,
    "survivors": (2, 1),
    "tokens": (12, 24),
    "group_rule": "none",
    "initial_candidates": 4,
    "initial_tokens": 12,
}


def prepared(folder: Path, *, tied: bool, method: Gguf | Gptq = METHOD) -> Run:
    """A tiny Llama with all its variants."""
    run = Run(folder / "run")
    write_depth_model(run, tiny("llama", tie_word_embeddings=tied))
    byte_level().save_pretrained(run.model)
    write_tokens(run, "calibration", sequences=4)
    write_tokens(run, "search", sequences=4, seed=1)
    context = StageContext(run, COMPUTE)
    accumulate_hessians(context, HessianSettings(), 0)
    for block in range(3):
        make_variants(context, "v", method, [block])
    make_embedding_variants(context, "v", method)
    return run


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared(tmp_path_factory.mktemp("size"), tied=request.param)


def sized(bytes_: int, **values: object) -> Evolution:
    strategy = Evolution(variants="v", target=SizeTarget(bytes=bytes_), exports=("gguf",), **{**SMALL, **values})
    return with_file(strategy, "searches.evo.target.file")


def is_tied(run: Run) -> bool:
    return "lm_head.weight" not in Checkpoint(run.model).names()


def smallest_and_largest(run: Run) -> tuple[int, int]:
    """Sizes of the files with all units at their lowest and at their highest level, as the exporter foresees them."""
    units = open_problem(run, Evolution(variants="v", target=5.5, **SMALL), "searches.evo").space.units
    exporter = GgufFile()
    fixed = exporter.fixed_bytes(run, [f"{unit.name}.weight" for unit in units])
    low, high = (sum(exporter.stored_bytes(unit.levels[end].bytes) for unit in units) for end in (0, -1))
    return fixed + low, fixed + high


def middle(run: Run) -> int:
    return sum(smallest_and_largest(run)) // 2


def test_tied_ones_are_one_unit_before_the_blocks_and_others_two(run: Run) -> None:
    store = VariantStore(run, "v")
    outer = store.table[~store.table["block"].isin(range(3))].drop_duplicates("name")
    expected = [(-1, "embedding", "model.embed_tokens"), (3, "head", "lm_head")]
    found = list(outer[["block", "layer", "name"]].itertuples(index=False, name=None))
    assert found == expected[:1] if is_tied(run) else found == expected
    problem = open_problem(run, sized(middle(run)), "searches.evo")
    assert problem.space.units[0].layer == EMBEDDING
    assert (problem.space.units[-1].layer == "head") == (not is_tied(run))


def test_a_candidate_is_judged_with_its_embedding_and_head(run: Run) -> None:
    """The oracle: the exported folder, run by transformers."""
    strategy = Uniform(variants="v", target=SizeTarget(bytes=middle(run)), exports=("gguf",))
    strategy = with_file(strategy, "searches.evo.target.file")
    run_search(StageContext(run, COMPUTE), "evo", strategy)
    run_export(StageContext(run), "evo", HuggingFace())
    problem = open_problem(run, strategy, "searches.evo")
    tokens = search_text(run)
    chosen = read_table(run.configuration("evo"), CONFIGURATION).set_index("unit")["level"]
    labels = [[level.label for level in unit.levels] for unit in problem.space.units]
    levels = [known.index(chosen[unit.name]) for known, unit in zip(labels, problem.space.units, strict=True)]
    candidate = np.array(levels, dtype=np.int16)
    evaluator = open_evaluator(StageContext(run, COMPUTE), problem, tokens, Fitness("kl"), "searches.evo", lambda: None)
    outer = [number for number, unit in enumerate(problem.space.units) if unit.layer in ("embedding", "head")]
    only_outer = np.full(len(candidate), DENSE_LEVEL, dtype=np.int16)
    only_outer[outer] = 0
    whole = Minibatch(tuple(range(len(tokens))), (tokens.shape[1],) * len(tokens))
    judged = evaluator.evaluate(np.stack([candidate, np.full_like(candidate, DENSE_LEVEL), only_outer]), whole)
    dense, made = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens.long()).logits.detach().log_softmax(-1)
        for folder in (run.model, run.export("evo", "huggingface"))
    )
    expected = float((dense.exp() * (dense - made)).sum(-1).mean())
    assert judged[0].fitness == pytest.approx(expected, rel=1e-3)
    assert judged[1].fitness == pytest.approx(0, abs=1e-6)
    assert judged[2].fitness > 1e-5


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_file_meets_its_size_and_holds_the_types_that_were_chosen(run: Run, share: float) -> None:
    low, high = smallest_and_largest(run)
    asked = int(low + share * (high - low))
    strategy = sized(asked)
    run_search(StageContext(run, COMPUTE), "evo", strategy)
    run_export(StageContext(run), "evo", HuggingFace())
    run_export(StageContext(run), "evo", GgufFile())
    file = run.export("evo", "gguf") / "evo.gguf"
    units = open_problem(run, strategy, "searches.evo").space.units
    chosen = read_table(run.configuration("evo"), CONFIGURATION).set_index("unit")["level"]
    steps = [
        after.bytes - before.bytes
        for unit in units
        for before, after in pairwise(unit.levels)
        if before.label == chosen[unit.name]
    ]
    assert asked - min(steps) < file.stat().st_size <= asked  # no unit could go up by a level
    kinds = {
        name: gguf.GGMLQuantizationType(tensor.kind).name for name, tensor in read_gguf_header(file).tensors.items()
    }
    assert kinds["token_embd.weight"] == chosen["model.embed_tokens"]
    assert kinds["blk.1.ffn_up.weight"] == chosen["model.layers.1.mlp.up_proj"]
    if not is_tied(run):
        assert kinds["output.weight"] == chosen["lm_head"]


def test_the_terms_of_the_original_are_in_the_file_and_in_its_size_from_the_first(tmp_path: Path) -> None:
    run = prepared(tmp_path, tied=True)
    without, _ = smallest_and_largest(run)
    (run.model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Tiny\n")
    low, _ = smallest_and_largest(run)
    run_search(StageContext(run, COMPUTE), "evo", sized(low))
    run_export(StageContext(run), "evo", HuggingFace())
    run_export(StageContext(run), "evo", GgufFile())
    file = run.export("evo", "gguf") / "evo.gguf"
    told, first = read_gguf_header(file, whole="general.").metadata, file.read_bytes()
    assert told["general.license"] == "apache-2.0" and told["general.languages"] == ["en", "de"]
    assert without < low == len(first)
    for exporter in (HuggingFace(), GgufFile()):
        write_card(StageContext(run), "evo", exporter)
    run_export(StageContext(run), "evo", GgufFile())
    assert file.read_bytes() == first


def test_sizes_that_cannot_be_are_refused_with_those_that_can(run: Run) -> None:
    low, high = smallest_and_largest(run)
    open_problem(run, sized(low), "searches.evo")
    open_problem(run, sized(high), "searches.evo")
    for asked, word, ends in (
        (low - 1, "below the smallest", (low, low + 1000)),
        (high + 1, "above the largest", (high - 1000, high)),
    ):
        with pytest.raises(ConfigError, match=rf"searches\.evo\.target: .* is {word} file") as error:
            open_problem(run, sized(asked), "searches.evo")
        said = re.search(r"file \(([\d.]+ MB)\)", str(error.value))
        assert said is not None
        size = SizeTarget(bytes=said[1]).bytes  # type: ignore[arg-type]
        assert size is not None and ends[0] <= size <= ends[1]
        open_problem(run, sized(size), "searches.evo")  # what is said can be asked for


def test_uniform_takes_the_highest_level_that_fits_and_spends_the_rest_from_the_front(run: Run) -> None:
    low, _ = smallest_and_largest(run)
    strategy = with_file(Uniform(variants="v", target=SizeTarget(bytes=low + 5000), exports=("gguf",)), "file")
    run_search(StageContext(run, COMPUTE), "flat", strategy)
    levels = read_table(run.configuration("flat"), CONFIGURATION)["level"].tolist()
    assert set(levels) == {"Q4_0", "Q5_0"}
    assert "Q5_0" in levels[:3] and levels[-1] == "Q4_0"


def test_integers_in_groups_count_packed_bytes(tmp_path: Path) -> None:
    run = prepared(tmp_path, tied=True, method=Gptq(bits=(2, 4, 8), group_size=32, embedding=True))
    dense = sum(Checkpoint(run.model).sizes().values())
    strategy = Evolution(variants="v", target=SizeTarget(fraction=0.2), **SMALL)
    problem = open_problem(run, strategy, "searches.evo")
    rest = dense - sum(4 * unit.parameters for unit in problem.space.units)
    assert problem.space.budget == int(0.2 * dense) - rest
    run_search(StageContext(run, COMPUTE), "evo", strategy)
    table = read_table(run.configuration("evo"), CONFIGURATION)
    assert rest + table["bytes"].sum() <= 0.2 * dense


def test_a_size_is_not_above_that_of_the_quantized_source() -> None:
    levels = (Level("a", 2.0, 200, 100), Level("b", 4.0, 400, 200))
    units, facts = (
        [Unit("u", 0, "u", "all", 100, levels)],
        FileFacts(fixed=50, dense=1000, parameters=100, multiply_adds=0, source=240),
    )
    assert size_budgets(units, SizeTarget(bytes=239), facts, "t") == (189,)
    with pytest.raises(ConfigError, match="not below the quantized file that the model comes from"):
        size_budgets(units, SizeTarget(bytes=240), facts, "t")
    assert size_budgets(units, SizeTarget(bytes=240, above_source=True), facts, "t") == (190,)


def test_a_plan_counts_the_file_as_the_search_does_once_the_model_is_prepared(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_depth_model(run, tiny("llama"))
    byte_level().save_pretrained(run.model)
    model = FolderModel(path=str(run.model))
    strategy = with_file(
        Uniform(variants="v", target=SizeTarget(bytes=1), exports=({"exporter": "gguf", "dense": "q8_0"},)), "file"
    )
    shape = shape_of(model, run)
    assert shape is not None and shape.source is None
    units = BITS.units(shape.table(METHOD, "variants.v"), "none")
    about = file_of(model, run, shape, strategy.target)(units)
    assert about == shape.file(units)
    (told,) = uncounted(model, run, {"evo": strategy, "other": Uniform(variants="v", target=3)})
    assert told.startswith("The model is not prepared yet, so header and tokenizer of the files of evo are not counted")
    manifest = json.loads(run.model_manifest.read_text())
    manifest |= {"source": json.loads(model.model_dump_json()), "origin": {"gguf_bytes": 91_700}}
    run.model_manifest.write_text(json.dumps(manifest))
    shape = shape_of(model, run)
    assert shape is not None and describe_model(shape).endswith(", from a quantized file of 91.7 kB")
    exactly = file_of(model, run, shape, strategy.target)(units)
    fixed = GgufFile(dense="q8_0").fixed_bytes(run, [f"{unit.name}.weight" for unit in units])
    assert (exactly.fixed, exactly.source) == (fixed, 91_700) and about.fixed < fixed
    assert uncounted(model, run, {"evo": strategy}) == []


@pytest.mark.parametrize(
    ("target", "limit", "text"),
    [
        ({"bytes": "95 MB"}, 95_000_000, "95 MB"),
        ({"bytes": "1.5 KiB"}, 1536, "0.002 MB"),
        ({"bytes": 1000}, 1000, "0.001 MB"),
        ({"fraction": 0.25}, 250, "0.25 of the dense model"),
        ({"bpw": 4}, 200, "4 bits a parameter"),
    ],
)
def test_targets_say_how_many_bytes(target: dict, limit: int, text: str) -> None:
    assert SizeTarget.model_validate(target).limit(dense=1000, parameters=400) == limit
    assert target_text(target) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": {"bytes": "95 apples"}}, "target.*'95 apples' is no size"),
        ({"target": {"bytes": 5, "bpw": 2}}, "target.*give one of bytes, fraction and bpw"),
        ({"target": {}}, "target.*give one of bytes, fraction and bpw"),
        ({"target": {"fraction": 1.5}}, "target.*fraction"),
        ({"target": {"byte": 5}}, "target.*did you mean 'bytes'"),
        ({"target": -1}, "target"),
        ({"target": "much"}, "target"),
    ],
)
def test_targets_that_make_no_sense_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        STRATEGIES.parse({"strategy": "uniform", "variants": "v", **values}, "searches.u")


def test_the_file_of_a_size_is_one_that_the_search_writes() -> None:
    strategy = Uniform(variants="v", target=SizeTarget(bytes=5, file="gguf"))
    with pytest.raises(ConfigError, match="'gguf' is none of the exports"):
        with_file(strategy, "searches.u.target.file")
    strategy = Uniform(variants="v", target=SizeTarget(bytes=5, file={"exporter": "huggingface"}))
    with pytest.raises(ConfigError, match="huggingface is the same size whatever the levels"):
        with_file(strategy, "searches.u.target.file")
    assert with_file(Uniform(variants="v", target=SizeTarget(bytes=5)), "x").target == SizeTarget(bytes=5)


def test_what_was_found_survives_as_text(run: Run) -> None:
    strategy = sized(middle(run))
    run_search(StageContext(run, COMPUTE), "evo", strategy)
    found = Configuration.read(run, "evo")
    text = found.text(run)
    assert f"model.embed_tokens: {found.table.iloc[0]['level']}" in text.splitlines()
    space = open_problem(run, strategy, "searches.evo").space
    assert parse_candidate(text, space, 3, "file").tolist() == found.nearest(space).tolist()


@pytest.mark.parametrize("how", ["sequential", "asymmetric"])
def test_a_polish_leaves_embedding_and_size_as_they_are(run: Run, how: Polish) -> None:
    strategy = sized(middle(run))
    run_search(StageContext(run, COMPUTE), "evo", strategy)
    files = []
    for polished in ("none", how):
        if polished != "none":
            polish(StageContext(run, COMPUTE), "evo", how, METHOD)
        run_export(StageContext(run), "evo", HuggingFace(), polished)
        run_export(StageContext(run), "evo", GgufFile(), polished)
        header = read_gguf_header(run.export("evo", "gguf") / "evo.gguf")
        tensors = {name: read_tensor(tensor).numpy() for name, tensor in header.tensors.items()}
        files.append(((run.export("evo", "gguf") / "evo.gguf").stat().st_size, tensors))
    (before, plain), (after, remade) = files
    assert before == after
    for name in ("token_embd.weight", "output.weight", "output_norm.weight"):
        assert name not in plain or np.array_equal(plain[name], remade[name])
    assert not np.array_equal(plain["blk.2.ffn_down.weight"], remade["blk.2.ffn_down.weight"])
