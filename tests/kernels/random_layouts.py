"""Random rows for the kernels' tests: forests of runs, documents, empty rows."""

from hypothesis import strategies as st

from agentx_kernels.layout import ROOT


@st.composite
def forests(draw, length: int, max_run: int = 9) -> list[tuple[int, int]]:
    """Runs in depth-first order, at most `length` tokens together, at times none."""
    runs: list[tuple[int, int]] = []
    path: list[int] = []
    left = draw(st.integers(0, length))
    while left:
        tokens = draw(st.integers(0 if runs and runs[-1][0] else 1, min(left, max_run)))
        kept = draw(st.integers(0, len(path)))
        path = path[:kept]
        runs.append((tokens, path[-1] if path else ROOT))
        path.append(len(runs) - 1)
        left -= tokens
    return runs


def rows_of_forests(batch: int, length: int, max_run: int = 9):
    """What `prefix_tree` takes."""
    return st.lists(forests(length, max_run), min_size=batch, max_size=batch)
