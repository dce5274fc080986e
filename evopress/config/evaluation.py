"""How finished models are judged."""

from pydantic import Field

from evopress.config.base import Section, UserPath


class TaskSettings(Section):
    """lm-eval tasks."""

    names: tuple[str, ...] = Field((), description="Task names, standard or defined under include_path.")
    include_path: UserPath | None = Field(None, description="Folder with YAML tasks of your own.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; null is the task's own.")
    limit: int | None = Field(None, ge=1, description="Documents per task; null is all.")
    run_generated_code: bool = Field(
        False, description="Allow tasks that run the code which the model writes, on the machine of the job."
    )
    batch_size: int = Field(8, ge=1, description="Requests that run at once.")


class EvaluationSettings(Section):
    """Perplexity on every data set of `data.evaluation`, and lm-eval tasks."""

    tasks: TaskSettings = TaskSettings()
