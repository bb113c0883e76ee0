"""Checkpoints of other formats, by tables that are read in both directions."""
