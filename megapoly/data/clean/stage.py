"""A stage of cleaning: steps that datatrove runs for a number of tasks before the next stage begins."""

from dataclasses import dataclass

from datatrove.pipeline.base import PipelineStep


@dataclass(frozen=True)
class Stage:
    """One run of an executor; stages run one after the other."""

    name: str
    tasks: int
    steps: list[PipelineStep]
