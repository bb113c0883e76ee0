"""What is computed in pieces and travels: what comes out, and what waits for what."""

import jax.numpy as jnp
import numpy as np
import pytest

from agentx_kernels.in_turn import in_turn

AFTER, HELD = jnp.full((1,), -1.0), jnp.full((1,), -2.0)


def run(num_pieces, num_steps):
    """What came out, what each piece waited for, and of each step its part and what that waited
    for. A part is named by its first piece; the j-th step adds 100 (j + 1)."""
    waited, steps = [], []
    pending = {}

    def piece(i):
        def compute(after):
            waited.append(float(after[0]))
            return jnp.full((1,), float(i))

        return compute

    def delayed(x, until):
        pending[float(x[0])] = float(until[0])
        return x

    def step(j):
        def move(part):
            steps.append((float(part[0]), pending.get(float(part[0]))))
            return part + 100 * (j + 1)

        return move

    joined, held = in_turn(
        [piece(i) for i in range(num_pieces)],
        [step(j) for j in range(num_steps)],
        after=AFTER,
        held=HELD,
        delayed=delayed,
    )
    np.testing.assert_array_equal(held, HELD)
    return np.asarray(joined), waited, steps


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("num_pieces", [1, 2, 3, 5, 6, 8])
def test_every_piece_arrives_once_and_in_order(num_pieces, num_steps):
    joined, waited, steps = run(num_pieces, num_steps)
    travelled = 100 * sum(range(1, num_steps + 1))
    np.testing.assert_array_equal(joined, np.arange(num_pieces) + travelled)
    assert len(waited) == num_pieces
    assert len(steps) == num_steps * -(-num_pieces // max(1, num_steps))


def test_beside_each_of_two_steps_one_piece_of_the_next_part_is_computed():
    _, waited, steps = run(6, 2)
    # The first part, of pieces 0 and 1, takes its first step beside piece 2, which waits for none,
    # and its second beside piece 3, which waits for the first.
    assert waited == [-1, -1, -1, 100, 300, 102]
    assert steps == [(0, None), (100, 2), (2, None), (102, 4), (4, None), (104, None)]


def test_with_one_step_a_piece_waits_for_that_of_the_piece_before_last():
    _, waited, steps = run(4, 1)
    assert waited == [-1, -1, 100, 101]
    assert [until for _, until in steps] == [None] * 4
