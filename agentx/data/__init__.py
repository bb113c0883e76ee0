"""From files and recordings to batches: formats -> store -> plan -> objectives -> pack -> Batch."""
