"""The code that a script runs, found from import statements, against what Python really imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evopress.workflow.code_dependencies import code_closure

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("scripts/*.py", "workflow/study_*.py")
    for path in REPOSITORY.glob(pattern)
)

# One child per script, forked from a parent that has the slow libraries loaded already.
IMPORT_EACH = """
import importlib.util, json, os, sys
import lm_eval, matplotlib, pandas, torch, transformers
root, *scripts = sys.argv[1:]
sys.path.insert(0, root)
found = {}
for script in scripts:
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.path.insert(0, os.path.dirname(f"{root}/{script}"))
        spec = importlib.util.spec_from_file_location("script", f"{root}/{script}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("evopress", "studies")]
        files = [m.__file__ for m in ours if m.__file__]
        os.write(writer, json.dumps([os.path.relpath(f, root) for f in files]).encode())
        os._exit(0)
    os.close(writer)
    found[script] = json.loads(os.fdopen(reader).read())
    os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Files of the package that each script imports when it starts."""
    command = [sys.executable, "-c", IMPORT_EACH, str(REPOSITORY), *SCRIPTS]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(outcome.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_closure_holds_all_that_is_imported(script: str, imported: dict[str, list[str]]) -> None:
    found = set(code_closure(Path(script), REPOSITORY))
    assert len(imported[script]) > 5
    assert set(imported[script]) - found == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_closure_holds_little_else(script: str, imported: dict[str, list[str]]) -> None:
    """Only modules that are imported late, when they are needed, and data files may come on top."""
    found = {path for path in code_closure(Path(script), REPOSITORY) if path.endswith(".py")}
    extra = found - set(imported[script]) - {script}
    assert {path for path in extra if path.startswith("evopress/workflow/")} == set()
    assert len(extra) <= 3, extra


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
            "scripts/x.py": "import evopress.a.one\nfrom evopress.b import two, CONSTANT\nimport numpy",
            "evopress/__init__.py": "",
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
    assert set(code_closure(Path("scripts/x.py"), root)) == everything - {"evopress/a/unused.py"}


def test_modules_beside_the_script_are_followed_and_no_others(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "workflow/x.py": "import json\nfrom own.a import f\nimport evopress",
            "workflow/own/__init__.py": "",
            "workflow/own/a.py": "from . import b\nimport own.c\nimport tests.d",
            "workflow/own/a.html.j2": "a template",
            "workflow/own/b.py": "from evopress import e",
            "workflow/own/c.py": "",
            "evopress/__init__.py": "import own.unused",
            "evopress/e.py": "",
        },
    )
    everything = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    others = {"workflow/x.html": "", "workflow/own/unused.txt": "", "own/c.py": "", "tests/d.py": "", "json.py": ""}
    tree(root, others)
    assert set(code_closure(Path("workflow/x.py"), root)) == everything


def test_an_edited_import_is_seen_by_the_same_process(tmp_path: Path) -> None:
    files = {"scripts/x.py": "import evopress.a", "evopress/__init__.py": "", "evopress/a.py": "", "evopress/b.py": ""}
    root = tree(tmp_path, files)
    assert "evopress/b.py" not in code_closure(Path("scripts/x.py"), root)
    (root / "evopress/a.py").write_text("import evopress.b")
    assert "evopress/b.py" in code_closure(Path("scripts/x.py"), root)
