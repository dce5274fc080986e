"""The code that a stage runs: found from import statements, against what Python imports, and told by what it does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evopress.compression.methods import METHODS
from evopress.export.exporters import EXPORTERS
from evopress.search.strategies import STRATEGIES
from evopress.workflow.code_dependencies import code_digest, code_files
from evopress.workflow.stages import STAGES

REPOSITORY = Path(__file__).resolve().parents[3]
MODULES = sorted({stage.module for stage in STAGES.values()})

# One child per module, forked from a parent that has the slow libraries loaded already.
IMPORT_EACH = """
import importlib, json, os, sys
import lm_eval, matplotlib, pandas, torch, transformers
root, *modules = sys.argv[1:]
sys.path.insert(0, root)
found = {}
for module in modules:
    reader, writer = os.pipe()
    if os.fork() == 0:
        importlib.import_module(module)
        files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "evopress" and m.__file__]
        os.write(writer, json.dumps([os.path.relpath(f, root) for f in files]).encode())
        os._exit(0)
    os.close(writer)
    found[module] = json.loads(os.fdopen(reader).read())
    os.wait()
print(json.dumps(found))
"""
PLUGINS = [type_.__module__ for registry in (METHODS, STRATEGIES, EXPORTERS) for type_ in registry.plugins]
"""Registries are not followed: what a job uses of them is named beside its stage."""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Files of the package that the module of each stage imports when it is imported."""
    command = [sys.executable, "-c", IMPORT_EACH, str(REPOSITORY), *MODULES]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(outcome.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", MODULES)
def test_all_that_is_imported_is_found_with_the_plugins(module: str, imported: dict[str, list[str]]) -> None:
    assert len(code_files([module], REPOSITORY)) > 5
    found = set(code_files([module, *PLUGINS], REPOSITORY))
    assert set(imported[module]) - found <= {"evopress/config/plugins.py"}, "the class of registries changes no result"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_every_form_of_import_is_followed(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "evopress/__init__.py": "",
            "evopress/x.py": "import evopress.a.one\nfrom evopress.b import two, CONSTANT\nimport numpy",
            "evopress/a/__init__.py": "",
            "evopress/a/one.py": "from . import three\nfrom ..b.four import f",
            "evopress/a/three.py": "def late():\n    from evopress.c import five",
            "evopress/a/unused.py": "",
            "evopress/b/__init__.py": "CONSTANT = 1",
            "evopress/b/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import evopress.a.unused",
            "evopress/b/four.py": "",
            "evopress/c.py": "import evopress.a.one",
            "evopress/c.html.j2": "a template",
        },
    )
    everything = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert set(code_files(["evopress.x"], root)) == everything - {"evopress/a/unused.py"}


def test_of_a_registry_only_the_plugin_that_is_named_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "evopress/__init__.py": "",
            "evopress/stage.py": "from evopress.kinds import KINDS",
            "evopress/kinds/__init__.py": "from evopress.kinds.one import One\nKINDS = Registry('kind', One)",
            "evopress/kinds/one.py": "import evopress.helper",
            "evopress/kinds/two.py": "",
            "evopress/helper.py": "",
        },
    )
    stage = {"evopress/__init__.py", "evopress/stage.py", "evopress/kinds/__init__.py"}
    assert set(code_files(["evopress.stage"], root)) == stage
    one = {"evopress/kinds/one.py", "evopress/helper.py"}
    assert set(code_files(["evopress.stage", "evopress.kinds.one"], root)) == stage | one


CODE = '''"""A module."""
from evopress.util import log

def f(x: int) -> int:
    """Add."""
    if x < 0:
        raise ValueError(f"{x}: is negative")
    log.info("adding to %d", x)
    return x + 1  # one more
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""A module, described better."""'),
        ('    """Add."""\n', ""),
        ("  # one more", ""),
        ("is negative", "must not be negative"),
        ('log.info("adding to %d", x)', 'log.warning("adding one to %d", x)'),
        ("x + 1", "(x + 1)"),
        ("\n\ndef", "\n\n\ndef"),
    ],
)
def test_what_cannot_change_results_does_not_change_the_digest(tmp_path: Path, old: str, new: str) -> None:
    root = tree(tmp_path, {"evopress/__init__.py": "", "evopress/a.py": CODE})
    before = code_digest(["evopress.a"], root)
    assert old in CODE
    (root / "evopress/a.py").write_text(CODE.replace(old, new))
    assert code_digest(["evopress.a"], root) == before


@pytest.mark.parametrize(("old", "new"), [("x + 1", "x + 2"), ("x < 0", "x <= 0"), ("ValueError", "TypeError")])
def test_what_can_change_results_changes_the_digest(tmp_path: Path, old: str, new: str) -> None:
    root = tree(tmp_path, {"evopress/__init__.py": "", "evopress/a.py": CODE})
    before = code_digest(["evopress.a"], root)
    (root / "evopress/a.py").write_text(CODE.replace(old, new))
    assert code_digest(["evopress.a"], root) != before


def test_a_data_file_beside_a_module_counts_whole(tmp_path: Path) -> None:
    root = tree(tmp_path, {"evopress/__init__.py": "", "evopress/a.py": "", "evopress/a.html.j2": "x"})
    before = code_digest(["evopress.a"], root)
    (root / "evopress/a.html.j2").write_text("y")
    assert code_digest(["evopress.a"], root) != before
