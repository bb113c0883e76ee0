"""A wrong call, taken back before a right one."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from rows import assert_shown_in, one_call, recovery, span, table, text, words

from agentx.data.formats import conversation_trajectory, read_documents
from agentx.data.objectives import NextToken, Recover
from agentx.data.objectives.calls import spread, whole_calls
from agentx.data.objectives.recover import failures_with_recovery
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Markers, Outcome, Role, Trajectory


def failure():
    spans = recovery().spans
    return Trajectory([*spans[:6], spans[7]])


def repaired():
    """What `failure` would be without its failure."""
    spans = failure().spans
    return Trajectory([spans[0], *spans[4:]])


def pool(folder):
    other = Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.CALL, "<|call|> os"),
            span(Role.ARGUMENTS, "<|arguments|> 2 <|end|>"),
        ]
    )
    TokenStore.write(folder / "pool", [text(), other], "words")
    return str(folder / "pool")


def test_recover_shows_what_its_docstring_shows(tmp_path):
    real = Recover(rate=1.0, inserted=0.0)(failure(), 0, 0, 0)
    assert_shown_in(Recover.__doc__, table(real, ("token", "weight"), (3, 5, 8)))
    inserted = Recover(rate=1.0, real=0.0, pool=pool(tmp_path))(repaired(), 0, 0, 0)
    assert_shown_in(Recover.__doc__, table(inserted, ("token", "weight"), (3, 5, 8)))


def test_what_is_put_in_is_a_failed_call_of_the_weights_asked_for(tmp_path):
    objective = Recover(rate=1.0, real=0.0, pool=pool(tmp_path), wrong=0.5, back=2.0)
    example = objective(repaired(), 0, 0, 0)
    assert example.weights.tolist() == [0] * 3 + [0.5] * 4 + [2] + [1] * 8
    failed, recovered = Outcome.FAILED, Outcome.RECOVERED
    assert example.outcomes.tolist() == [0] * 3 + [failed] * 4 + [recovered] * 6 + [0] * 3
    assert len(example) <= len(repaired()) + objective.room(repaired())
    without = [*example.ids[:3], *example.ids[8:]]
    assert without == repaired().ids.tolist()


def test_the_thought_of_the_right_step_is_kept():
    spans = failure().spans
    thought = span(Role.THOUGHT, "<|thought|> os", Outcome.RECOVERED)
    thoughtful = Trajectory([*spans[:4], thought, *spans[4:]])
    example = Recover(rate=1.0, inserted=0.0)(thoughtful, 0, 0, 0)
    assert words(example) == (
        "<|bos|> <|user|> go <|call|> ls <|arguments|> x <|back|> <|thought|> os "
        "<|call|> ls <|arguments|> . <|end|> <|answer|> 2 <|end|>"
    )


def test_without_a_pool_the_wrong_call_is_another_of_the_document():
    spans = one_call().spans
    other = [span(Role.CALL, "<|call|> os"), span(Role.ARGUMENTS, "<|arguments|> <|end|>")]
    two = Trajectory([*spans[:3], *other, spans[3]])
    found = {words(Recover(rate=1.0)(two, 0, 0, i)) for i in range(40)}
    assert found == {
        "<|bos|> <|user|> go <|call|> os <|arguments|> <|back|> <|call|> ls <|arguments|> x "
        "<|end|> <|call|> os <|arguments|> <|end|> <|answer|> 2 <|end|>",
        "<|bos|> <|user|> go <|call|> ls <|arguments|> x <|end|> <|call|> ls <|arguments|> x "
        "<|back|> <|call|> os <|arguments|> <|end|> <|answer|> 2 <|end|>",
    }
    assert Recover(rate=1.0, longest=3).room(two) == 3
    short = {words(Recover(rate=1.0, longest=4)(two, 0, 0, i)) for i in range(40)}
    assert len(short) == 2  # as it was, or with the one call of 4 tokens
    assert words(NextToken()(two, 0, 0, 0)) in short


def test_where_there_is_no_wrong_call_to_be_had_a_document_is_left_as_it_is(tmp_path):
    for trajectory in (one_call(), text()):
        example = Recover(rate=1.0)(trajectory, 0, 0, 0)
        assert example.ids.tolist() == trajectory.ids.tolist()
    assert Recover(rate=1.0).room(text()) == 0
    assert Recover(rate=0.0).room(one_call()) == 0
    # A call like the right one is not wrong.
    TokenStore.write(tmp_path / "same", [one_call()], "words")
    same = Recover(rate=1.0, pool=str(tmp_path / "same"))(one_call(), 0, 0, 0)
    assert same.ids.tolist() == one_call().ids.tolist()


def test_a_pool_without_a_call_that_is_short_enough_is_refused(tmp_path):
    objective = Recover(rate=1.0, real=0.0, pool=pool(tmp_path), longest=4)
    with pytest.raises(ValueError, match="has no call of at most 4 tokens for Recover to put in"):
        objective(one_call(), 0, 0, 0)


def test_of_a_large_store_documents_are_read_that_are_spread_over_it():
    assert list(spread(range(5))) == [0, 1, 2, 3, 4]
    large = list(spread(range(3000)))
    assert len(large) == 1024
    assert set(np.diff(large).tolist()) == {2, 3}


def test_recover_keeps_its_rate_and_depends_on_its_integers_alone(tmp_path):
    objective = Recover(rate=0.3, pool=pool(tmp_path))
    made = [words(objective(failure(), 5, 1, i)) for i in range(1000)]
    assert made[::-1] == [words(objective(failure(), 5, 1, i)) for i in reversed(range(1000))]
    changed = [m for m in made if "<|back|>" in m]
    assert len(changed) == pytest.approx(300, abs=60)
    assert sum("<|call|> os" in m for m in changed) == pytest.approx(150, abs=50)


SHARED = Path(__file__).parents[2] / "shared" / "data"
# Each file, and the least share of its episodes in which a failure is followed by its recovery.
REAL = {
    "intercode/ic_sql_multiturn_gpt-3.5_10_turns.json": 0.1,
    "intercode/ic_bash_multiturn_gpt-3.5_10_turns_fs_1.json": 0.05,
    "tau_bench/gpt-4o-airline.json": 0.02,
}


@pytest.mark.parametrize("name", REAL)
def test_real_episodes_hold_failures_that_recover(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    renderer = ToolRenderer(Tokenizer.bytes())
    objective = Recover(rate=1.0, inserted=0.0, back=3.0)
    conversations = itertools.islice(read_documents(path), 200)
    episodes = [conversation_trajectory(c, renderer) for c in conversations]
    with_recovery = 0
    for index, episode in enumerate(episodes):
        pairs = failures_with_recovery(whole_calls(episode))
        example = objective(episode, 0, 0, index)
        backs = example.ids == Markers().back
        assert backs.sum() == bool(pairs)
        assert (example.weights[backs] == 3).all()
        if pairs:
            with_recovery += 1
            assert len(example) <= len(episode)  # what came of the failure is left out
    assert with_recovery > REAL[name] * len(episodes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Recover(rate=2.0), "Recover.rate is 2.0; it must be in [0, 1]"),
        (lambda: Recover(wrong=-1.0), "Recover.wrong and back must be 0 or more, got -1.0 and 1.0"),
        (lambda: Recover(longest=2), "Recover.longest is 2; a call has 3 tokens or more"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
