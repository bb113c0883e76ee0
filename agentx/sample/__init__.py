"""The sampler: `Engine` and what it gives."""

from agentx.sample.engine import Engine, Session, Turn
from agentx.sample.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams", "Session", "Turn"]
