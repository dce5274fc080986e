"""The search stage, in one process or several."""

from evopress.artifacts.paths import Run
from evopress.config.compute import ComputeSettings
from evopress.search.processes.launch import Job, run_in_processes
from evopress.search.settings import SearchSettings
from evopress.search.stage import search


def run_search(
    run: Run,
    name: str,
    settings: SearchSettings,
    compute: ComputeSettings,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Choose a level for every unit; write ``run.configuration(name)`` and ``run.trace(name)``.

    A search that was killed goes on from its last finished generation. On SIGTERM the process exits with code 143.
    Strategies that judge candidates by the model use all processes, the others one.

    Raises:
        ConfigError: the target, the levels, the text and the memory do not allow the search.
        ArtifactError: variants or tokens are missing, damaged or of another model.
        SearchError: no candidate has a fitness, or one of several processes died.
    """
    if settings.workers(compute.processes) > 1:
        run_in_processes(Job(run, name, settings, compute, trust_remote_code))
    else:
        search(run, name, settings, compute, trust_remote_code)
