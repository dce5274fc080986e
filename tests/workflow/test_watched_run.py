"""The live view of a run that has ended: every job has said that it finished."""

import subprocess
import sys

from planning import Checkout


def test_all_stages_of_a_whole_run_are_finished(finished: Checkout) -> None:
    command = [sys.executable, "-m", "evopress", "watch", "results/tiny", "--once"]
    done = subprocess.run(command, cwd=finished.root, capture_output=True, text=True, check=True)
    rows = [line.split("  ") for line in done.stdout.splitlines()[2:]]
    stages = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert {"model", "tokens", "hessians", "variants gptq", "search evo", "export", "evaluation evo", "report"} <= set(
        stages
    )
    assert all(cells[1:] == ["finished"] for cells in stages.values()), done.stdout
