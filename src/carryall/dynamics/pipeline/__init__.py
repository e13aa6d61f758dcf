"""Stages over ranks: `a | b | c`. Start with `pipeline.py`, then `hub.py` (who has what) and `worker.py` (a rank's loop)."""

from carryall.dynamics.pipeline.pipeline import DistributedPipeline as DistributedPipeline
from carryall.dynamics.pipeline.stages import PipelineStage as PipelineStage
