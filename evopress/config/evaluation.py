"""How finished models are judged, and what their cards say."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

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


class RuntimeSettings(Section):
    """Exported GGUF files in llama.cpp: whether they compute what was judged, their memory and their speed."""

    tokens: int = Field(
        4096,
        ge=1,
        description="Tokens of each evaluation text, at most, on which the runtime is compared with this package; "
        "whole sequences, and at least one.",
    )
    largest_kl: float = Field(
        0.05,
        gt=0,
        allow_inf_nan=False,
        description="Divergence from this package (nats per token) beyond which a file is an error. llama.cpp rounds "
        "what goes into quantized matrices to 8 bits, which small models answer with up to 0.01; a file that holds "
        "another model than the one that was judged is off by far more.",
    )
    prompt: int = Field(512, ge=1, description="Tokens of the prompt whose processing is timed.")
    generated: int = Field(64, ge=1, description="Tokens after it, whose generation is timed.")
    repetitions: int = Field(5, ge=1, description="Times that both are timed; the median counts.")


def _section(value: Any) -> Any:
    """What `true` and `false` stand for."""
    return ({} if value else None) if isinstance(value, bool) else value


class EvaluationSettings(Section):
    """Scores on every data set of `data.evaluation`, lm-eval tasks, and exported files in their runtime."""

    tasks: TaskSettings = TaskSettings()
    runtime: Annotated[
        RuntimeSettings | None, BeforeValidator(_section, json_schema_input_type=RuntimeSettings | bool | None)
    ] = None


class CardSettings(Section):
    """What model cards say that no artifact knows."""

    quantized_by: str | None = Field(
        None,
        min_length=1,
        description="Who compressed the models, as a user or organization of the hub: `quantized_by` of their cards.",
    )


class CardFacts(CardSettings):
    """The same, with what the settings of a model's source say."""

    base_model: str | None = None
    """Repository on the hub that a GGUF file was made of."""
