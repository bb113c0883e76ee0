"""Attention, decoding and log-probabilities for training agents. Knows nothing of agentx."""
