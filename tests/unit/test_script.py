"""How scripts end: Ctrl-C, at whatever moment, is one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = '''
import sys, time, types
from evopress.cli.stage import main
from evopress.workflow.stages import Stage

def stage(run):
    """About."""
    {before}
    print("started", flush=True)
    time.sleep(600)

sys.modules["toy"] = types.ModuleType("toy")
sys.modules["toy"].stage = stage
main(["toy", *sys.argv[1:]], {{"toy": Stage("toy", "stage")}})
'''


@pytest.mark.parametrize("before", ["pass", "import torch"])
@pytest.mark.parametrize("logged", [False, True])
def test_ctrl_c_is_one_line_and_the_exit_code_of_shells(tmp_path: Path, before: str, logged: bool) -> None:
    log = ["--log", str(tmp_path / "a.log")] if logged else []
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(before=before), "--run", str(tmp_path), *log],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may run in the background
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = error.splitlines()
    assert line.endswith("interrupted")
    if logged:
        assert (tmp_path / "a.log").read_text().endswith("ERROR interrupted\n")


def test_the_script_imports_nothing_that_takes_seconds_before_it_can_be_interrupted() -> None:
    code = (
        "import runpy, sys\n"
        "runpy.run_path('scripts/stage.py')\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": "."}, check=True)


def test_the_parse_of_the_workflow_imports_nothing_heavy() -> None:
    code = (
        "import sys, evopress.workflow.foreseen, evopress.workflow.jobs\n"
        "import evopress.config.tasks, evopress.util.job_logs\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'pandas'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
