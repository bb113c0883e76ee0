"""agentx: an end-to-end trainer for agent models in JAX."""
