"""Tasks told from their YAML files alone: unknown ones, and those that run generated code."""

from pathlib import Path

import pytest

from evopress.config.evaluation import TaskSettings
from evopress.config.tasks import require_tasks
from evopress.util.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task that runs code, one that includes it, groups and tags of both, and harmless ones."""
    contents = {
        "code.yaml": "task: codelike\ntag:\n  - programs\noutput_type: generate_until\nunsafe_code: true\n",
        "deep/longer.yaml": "include: ../code.yaml\ntask: codelike_64\n",
        "deep/group.yaml": "group: coding\ntask:\n  - plain\n  - codelike_64\n",
        "outer.yaml": "group: everything\ntask:\n  - coding\n  - plain\n",
        "plain.yaml": "task: plain\ntag: [easy, short]\nunsafe_code: false\n",
        "template_yaml": "output_type: multiple_choice\n",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def settings(folder: Path, *names: str, confirmed: bool = False) -> TaskSettings:
    return TaskSettings(names=names, include_path=str(folder), run_generated_code=confirmed)


@pytest.mark.parametrize("name", ["codelike", "codelike_64", "programs", "coding", "everything"])
def test_what_runs_generated_code_is_refused_unless_confirmed(folder: Path, name: str) -> None:
    require_tasks(settings(folder, "plain", name, confirmed=True))
    with pytest.raises(ConfigError) as caught:
        require_tasks(settings(folder, "plain", name))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"evaluation.tasks.names: '{name}' runs the code that the model writes")
    assert line.endswith("set evaluation.tasks.run_generated_code: true")


@pytest.mark.parametrize("name", ["plain", "easy", "short"])
def test_harmless_tasks_pass(folder: Path, name: str) -> None:
    require_tasks(settings(folder, name))


def test_no_tasks_need_no_folder() -> None:
    require_tasks(TaskSettings(names=(), include_path="/nowhere"))


def test_standard_tasks_are_known_and_those_that_run_code_refused(folder: Path) -> None:
    """The files of lm-eval itself."""
    require_tasks(settings(folder, "arc_easy", "mmlu", "plain"))
    with pytest.raises(ConfigError) as caught:
        require_tasks(settings(folder, "humaneval_64", "arc_esay", "plain"))
    unknown, unsafe = str(caught.value).splitlines()
    assert "unknown task 'arc_esay': did you mean 'arc_easy'" in unknown
    assert "'humaneval_64' runs the code" in unsafe
