"""How fast agentx is on one common workload. See README.md."""

import time

# Before anything heavy is imported: the time to the first step counts from here.
START = time.perf_counter()
