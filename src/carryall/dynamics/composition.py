"""The operators that make pipelines of dynamics; `+`, which fuses them, is in `fused.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine
    from carryall.dynamics.pipeline import DistributedPipeline, PipelineStage
    from carryall.dynamics.pipeline.stages import Stage


def chained(left: Stage | Engine | DistributedPipeline, right: Stage | Engine | DistributedPipeline) -> DistributedPipeline:
    """`a | b`: systems that are done with `a` go on to `b`, on another rank; see `DistributedPipeline`."""
    from carryall.dynamics.pipeline.pipeline import chain

    return chain(left, right)


def on_ranks(engine: Engine, n_ranks: int) -> PipelineStage:
    """`a * 4`: a stage of a pipeline on four ranks, which share its systems."""
    from carryall.dynamics.pipeline.stages import PipelineStage

    return PipelineStage(engine, n_ranks)
