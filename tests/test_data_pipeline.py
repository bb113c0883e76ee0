import collections
import dataclasses
import re
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from agentx.data import plan as plan_module
from agentx.data.objectives import InfillCall, Mixture, NextToken, PlainText, Recover, Schedule
from agentx.data.pipeline import Draw, MixturePipeline, Source, Stage, prefetch, read_rows
from agentx.data.plan import plan_of, plan_rows
from agentx.data.store import TokenStore
from agentx.tokenizer import SPECIAL_TOKENS
from agentx.trajectory import Role, Span, Trajectory

BOS, CALL, ARGUMENTS, END = (
    SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("bos", "call", "arguments", "end")
)


def text(ids):
    return Trajectory([Span(Role.TEXT, np.array(ids, np.int32))])


def calls(first, num_calls):
    """A trajectory of 3 + 6 * num_calls tokens; word tokens are first, first + 1, ..."""
    ids = iter(range(first, first + 100))
    spans = [Span(Role.USER, np.array([BOS, next(ids), next(ids)], np.int32))]
    for _ in range(num_calls):
        spans.append(Span(Role.CALL, np.array([CALL, next(ids)], np.int32)))
        spans.append(
            Span(Role.ARGUMENTS, np.array([ARGUMENTS, next(ids), next(ids), END], np.int32))
        )
    return Trajectory(spans)


def read_row(store, plan, objective, seed, epoch, row):
    return read_rows(store, plan, objective, seed, [Draw(0, epoch, row)])[0]


def store_of(path, trajectories):
    return TokenStore.write(path, trajectories, "tok")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """150 texts, 1 to 99 tokens long; every token of the store is another one."""
    lengths = np.random.default_rng(0).integers(1, 100, 150)
    ends = np.cumsum(lengths)
    documents = [text(range(e - n + 1000, e + 1000)) for e, n in zip(ends, lengths, strict=True)]
    return store_of(tmp_path_factory.mktemp("texts"), documents)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    trajectories = [calls(100 * i + 50_000, 1 + i % 5) for i in range(80)]
    return store_of(tmp_path_factory.mktemp("conversations"), trajectories)


def test_a_plan_predicts_every_token_once_but_the_first_of_each_document(texts):
    plan = plan_rows(texts, PlainText(), 40)
    targets = []
    for row in range(plan.num_rows):
        examples = read_row(texts, plan, PlainText(), 0, 0, row)
        assert sum(len(e) - 1 for e in examples) <= 40
        targets += [i for e in examples for i in e.ids[e.weights > 0].tolist()]
    expected = [i for t in texts for i in t.ids[1:].tolist()]
    assert sorted(targets) == expected
    assert plan.num_split == int((texts.lengths > 41).sum())
    assert plan.num_short == int((texts.lengths == 1).sum()) > 0


def test_best_fit_leaves_little_room(texts):
    plan = plan_rows(texts, PlainText(), 256)
    assert plan.fill == (texts.num_tokens - 150) / (plan.num_rows * 256)
    assert plan.fill > 0.96


def test_a_long_conversation_is_cut_at_borders_of_spans(tmp_path):
    store = store_of(tmp_path, [calls(100, 3)])
    # 21 tokens; the spans end at 3, 5, 9, 11, 15, 17, 21. A piece has at most 10 + 1 tokens and
    # begins with the last token of the one before.
    plan = plan_rows(store, NextToken(), 10)
    pieces = sorted(zip(plan.begin.tolist(), plan.end.tolist(), strict=True))
    assert pieces == [(0, 11), (10, 21)]
    plan = plan_rows(store, NextToken(), 9)
    pieces = sorted(zip(plan.begin.tolist(), plan.end.tolist(), strict=True))
    assert pieces == [(0, 9), (8, 17), (16, 21)]
    assert plan.num_split == 1


def test_a_span_longer_than_a_row_is_cut_anywhere(tmp_path):
    store = store_of(tmp_path, [text(range(10))])
    plan = plan_rows(store, PlainText(), 4)
    pieces = sorted(zip(plan.begin.tolist(), plan.end.tolist(), strict=True))
    assert pieces == [(0, 5), (4, 9), (8, 10)]


def test_where_all_pieces_are_long_rows_are_filled_by_cutting_at_more_borders(tmp_path):
    # 60 to 190 tokens, in rows of 150: what is left of a document leaves room that nothing fits.
    store = store_of(tmp_path, [calls(1000 * i, 10 + i % 20) for i in range(60)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_LEAST", 8)
        plan = plan_rows(store, NextToken(), 150)
        patch.setattr(plan_module, "_FULL", 0.0)
        before = plan_rows(store, NextToken(), 150)
    assert plan.fill > 0.98 > 0.92 > before.fill
    assert plan.num_targets == before.num_targets == store.num_tokens - 60
    assert plan.num_split == before.num_split
    targets = []
    for row in range(plan.num_rows):
        pieces = plan.pieces(row)
        assert sum(end - begin - 1 for _, begin, end in pieces) <= 150
        for document, begin, end in pieces:
            assert end in store.span_ends(document)
            targets += [(document, token) for token in range(begin + 1, end)]
    assert sorted(targets) == [
        (document, token) for document in range(60) for token in range(1, store.lengths[document])
    ]
    whole = [d for d in range(60) if store.lengths[d] <= 151]
    assert [d for d in whole if (plan.document == d).sum() == 1] == whole
    assert re.fullmatch(
        r"\d+ rows of 150 tokens, 9\d\.\d % full; \d+ documents are cut, into \d+ pieces",
        str(plan),
    )


@dataclasses.dataclass(frozen=True)
class Roomy(NextToken):
    def room(self, trajectory):
        return 1


@pytest.mark.parametrize("spans", [(11, 22), (3, 30, 3), (9, 9, 9, 2), (40,), (5, 1, 26)])
def test_no_piece_is_longer_than_a_row_or_in_two_of_them_wherever_the_borders_are(tmp_path, spans):
    ids = iter(range(1000))
    document = Trajectory(
        [Span(Role.TEXT, np.array([next(ids) for _ in range(n)], np.int32)) for n in spans]
    )
    store = store_of(tmp_path, [document])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_LEAST", 2)
        plan = plan_rows(store, Roomy(), 8)
    pieces = [plan.pieces(row) for row in range(plan.num_rows)]
    assert max(sum(end - begin for _, begin, end in row) for row in pieces) <= 8
    told = [token for row in pieces for _, begin, end in row for token in range(begin + 1, end)]
    assert sorted(told) == list(range(1, sum(spans)))


def test_an_objective_that_lengthens_documents_finds_its_room_reserved(conversations):
    objective = InfillCall(rate=1.0)
    for length in (16, 33, 64):
        plan = plan_rows(conversations, objective, length)
        for row in range(plan.num_rows):
            for epoch in range(3):
                examples = read_row(conversations, plan, objective, 0, epoch, row)
                assert sum(len(e) - 1 for e in examples) <= length


def test_a_row_is_the_same_whenever_it_is_read_and_another_in_the_next_epoch(conversations):
    objective = InfillCall(rate=0.5)
    plan = plan_rows(conversations, objective, 64)

    def read(seed, epoch):
        rows = [read_row(conversations, plan, objective, seed, epoch, r) for r in range(10)]
        return [e.ids.tolist() for row in rows for e in row]

    assert read(0, 0) == read(0, 0)
    assert read(0, 0) != read(0, 1)
    assert read(0, 0) != read(1, 0)


def test_the_draws_of_a_document_do_not_depend_on_the_length_of_the_rows(conversations):
    objective = InfillCall(rate=0.5)

    def read(length):
        plan = plan_rows(conversations, objective, length)
        rows = [read_row(conversations, plan, objective, 0, 0, r) for r in range(plan.num_rows)]
        return sorted(e.ids.tolist() for row in rows for e in row)

    assert read(40) == read(200)


def test_shares_are_shares_of_tokens_whatever_the_length_of_documents(tmp_path):
    short = store_of(tmp_path / "short", [text([1] * 51) for _ in range(400)])
    long = store_of(tmp_path / "long", [text([2] * 501) for _ in range(40)])
    sources = [Source("short", short, PlainText(), 3), Source("long", long, PlainText(), 1)]
    pipeline = MixturePipeline(sources, rows_per_batch=8, length=500, seed=0)
    seen = np.zeros(3)
    for step in range(100):
        batch = pipeline.batch(step)
        seen += np.bincount(batch.tokens[batch.weights > 0], minlength=3)
    assert seen[1] / seen.sum() == pytest.approx(0.75, abs=0.01)


def test_shares_hold_though_the_rows_of_one_source_are_less_full(tmp_path):
    # Rows of 99 places hold one document of 51 tokens, or three of 34: 50 targets against 99.
    loose = store_of(tmp_path / "loose", [text([1] * 51) for _ in range(100)])
    tight = store_of(tmp_path / "tight", [text([2] * 34) for _ in range(300)])
    sources = [Source("l", loose, PlainText(), 1), Source("t", tight, PlainText(), 1)]
    pipeline = MixturePipeline(sources, rows_per_batch=8, length=99, seed=0)
    seen = np.zeros(3)
    for step in range(100):
        batch = pipeline.batch(step)
        seen += np.bincount(batch.tokens[batch.weights > 0], minlength=3)
    assert seen[1] / seen.sum() == pytest.approx(0.5, abs=0.01)


def test_every_stretch_of_rows_has_the_asked_shares(texts, conversations):
    sources = [Source("t", texts, PlainText(), 0.7), Source("c", conversations, NextToken(), 0.3)]
    pipeline = MixturePipeline(sources, 10, 64, seed=0)
    for step in range(50):
        drawn = collections.Counter(d.source for d in pipeline.draws(step))
        assert abs(drawn[0] - 7) <= 1


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(texts):
    pipeline = MixturePipeline([Source("t", texts, PlainText())], 1, 64, seed=0)
    num_rows = pipeline.plans[0].num_rows
    draws = [pipeline.draws(step)[0] for step in range(2 * num_rows)]
    first, second = draws[:num_rows], draws[num_rows:]
    assert [d.epoch for d in draws] == [0] * num_rows + [1] * num_rows
    assert sorted(d.row for d in first) == list(range(num_rows))
    assert sorted(d.row for d in second) == list(range(num_rows))
    assert [d.row for d in first] != [d.row for d in second]
    assert [d.row for d in first] != sorted(d.row for d in first)


def mixed(texts, conversations, seed=0, rate=0.5):
    sources = [
        Source("t", texts, PlainText(), 0.6),
        Source("c", conversations, InfillCall(rate=rate), 0.4),
    ]
    return MixturePipeline(sources, 4, 64, seed)


def test_a_batch_is_a_pure_function_of_the_step(texts, conversations):
    pipeline = mixed(texts, conversations)
    forward = [pipeline.batch(step) for step in range(12)]
    fresh = mixed(texts, conversations)
    for step in (11, 3, 7, 0):
        jax.tree.map(np.testing.assert_array_equal, fresh.batch(step), forward[step])
    assert not np.array_equal(forward[0].tokens, mixed(texts, conversations, 1).batch(0).tokens)


def test_a_batch_has_the_shape_asked_for_and_little_padding(texts, conversations):
    pipeline = mixed(texts, conversations)
    batches = [pipeline.batch(step) for step in range(30)]
    assert {b.tokens.shape for b in batches} == {(4, 64)}
    assert {len(jax.tree.leaves(b)) for b in batches} == {6}
    assert np.mean([b.layout.subtree_end > 0 for b in batches]) > 0.85


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_any_number_of_hosts_reads_the_same_global_batches(texts, conversations, num_hosts):
    sources = [Source("t", texts, PlainText(), 0.6), Source("c", conversations, InfillCall(), 0.4)]
    whole = MixturePipeline(sources, 8, 64, 0)
    # A run that stops at any step and goes on with another number of hosts: nothing but the step
    # is handed on.
    hosts = [MixturePipeline(sources, 8, 64, 0) for _ in range(num_hosts)]
    for step in (0, 5, 6):
        parts = [p.batch(step, host, num_hosts) for host, p in enumerate(hosts)]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, whole.batch(step))


def test_rows_that_hosts_cannot_share_are_refused(texts, conversations):
    with pytest.raises(ValueError, match="4 rows can't be split over 3 hosts, of which"):
        mixed(texts, conversations).batch(0, 0, 3)


def staged(texts, conversations, num_steps=30):
    sources = [Source("t", texts, PlainText()), Source("c", conversations, NextToken())]
    stages = (Stage(0.5, (1.0, 0.0)), Stage(0.8, (0.25, 0.75)), Stage(1.0, (0.0, 1.0)))
    return MixturePipeline(sources, 4, 64, 0, num_steps=num_steps, stages=stages)


def test_shares_change_by_stage_and_no_row_is_read_twice_or_left_out(texts, conversations):
    pipeline = staged(texts, conversations)
    drawn = [pipeline.draws(step) for step in range(30)]
    first, second, third = (
        collections.Counter(d.source for draws in drawn[a:b] for d in draws)
        for a, b in ((0, 15), (15, 24), (24, 30))
    )
    assert first == {0: 60}
    assert third == {1: 24}
    # A share of tokens: the two plans' rows are not equally full.
    rates = [plan.num_targets / plan.num_rows for plan in pipeline.plans]
    tokens = [second[source] * rate for source, rate in enumerate(rates)]
    assert tokens[1] / sum(tokens) == pytest.approx(0.75, abs=0.03)
    for source, plan in enumerate(pipeline.plans):
        rows = [(d.epoch, d.row) for draws in drawn for d in draws if d.source == source]
        whole_epochs = len(rows) // plan.num_rows
        assert len(set(rows)) == len(rows)
        for epoch in range(whole_epochs):
            own = rows[epoch * plan.num_rows : (epoch + 1) * plan.num_rows]
            assert sorted(own) == [(epoch, row) for row in range(plan.num_rows)]


def test_a_step_far_ahead_in_a_stage_far_ahead_is_found_at_once(texts, conversations):
    pipeline = staged(texts, conversations, num_steps=10**9)
    pipeline.batch(0)
    start = time.process_time()  # other processes of a busy machine do not count
    pipeline.batch(9 * 10**8)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("until", "num_steps"), [(0.5, 5), (0.3, 10), (0.1, 3), (0.7, 1000), (0.01, 7)]
)
def test_a_stage_ends_at_the_step_at_which_a_schedule_changes(texts, until, num_steps):
    objective = Schedule((NextToken(), NextToken(text=2.0)), until=(until, 1.0))
    sources = [Source("a", texts, objective), Source("b", texts, objective)]
    stages = (Stage(until, (1.0, 0.0)), Stage(1.0, (0.0, 1.0)))
    pipeline = MixturePipeline(sources, 1, 64, 0, num_steps=num_steps, stages=stages)
    for step in range(num_steps):
        is_later = pipeline.objective(0, step) == objective.objectives[1]
        assert pipeline.draws(step)[0].source == is_later


def test_stages_that_do_not_fit_are_refused(texts):
    source = [Source("t", texts, PlainText())]
    for stages, sentence in (
        ((Stage(0.5, (1.0,)),), r"the stages end at 0\.5 of the training; the ends must grow"),
        ((Stage(0.5, (1.0,)), Stage(0.5, (1.0,)), Stage(1, (1.0,))), "the ends must grow"),
        ((Stage(1, (1.0, 2.0)),), "stage 0 has 2 shares for 1 sources"),
        ((Stage(0.5, (0.0,)), Stage(1, (1.0,))), "stage 0 leaves out every source"),
        ((Stage(0.5, (1.0,)), Stage(1, (-1.0,))), r"source 't' has a share of 1\.0, -1\.0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            MixturePipeline(source, 1, 64, 0, num_steps=10, stages=stages)
    with pytest.raises(ValueError, match="shares of a training: say its num_steps"):
        MixturePipeline(source, 1, 64, 0, stages=(Stage(0.5, (1.0,)), Stage(1, (2.0,))))


@dataclasses.dataclass(frozen=True)
class Later:
    """Weights of 1 in the first half of training, and of 2 in the second."""

    def at(self, progress):
        return NextToken(text=1.0 if progress < 0.5 else 2.0)

    def room(self, trajectory):
        return 0


def test_an_objective_may_change_in_the_course_of_training(texts):
    pipeline = MixturePipeline([Source("t", texts, Later())], 2, 64, 0, num_steps=4)
    highest = [float(pipeline.batch(step).weights.max()) for step in range(5)]
    assert highest == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_a_plan_is_kept_beside_the_store_and_made_anew_where_anything_changed(tmp_path):
    store = store_of(tmp_path, [calls(100 * i, 2) for i in range(9)])
    plan = plan_of(store, InfillCall(rate=1.0), 64)
    (kept,) = (tmp_path / "plans").iterdir()
    opened = TokenStore.open(tmp_path)
    again = plan_of(opened, InfillCall(rate=1.0), 64)
    for field in dataclasses.fields(plan):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(plan, field.name))
    assert plan_of(opened, InfillCall(rate=0.0), 64).fingerprint != plan.fingerprint
    assert plan_of(opened, InfillCall(rate=1.0), 65).fingerprint != plan.fingerprint
    assert len(list((tmp_path / "plans").iterdir())) == 3
    kept.write_bytes(kept.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"\.npz is damaged \(.*\): delete it"):
        plan_of(opened, InfillCall(rate=1.0), 64)


def test_a_plan_that_cannot_be_kept_is_used_and_said(tmp_path, capsys):
    store = store_of(tmp_path, [calls(100, 2)])
    (tmp_path / "plans").write_text("a file in the place of the folder")
    assert plan_of(store, NextToken(), 64).num_rows == 1
    assert f"the plan of {tmp_path} is not kept: cannot write" in capsys.readouterr().err


def test_the_identity_changes_with_whatever_changes_a_batch(texts, conversations):
    identity = mixed(texts, conversations).identity
    assert mixed(texts, conversations).identity == identity
    assert mixed(texts, conversations, seed=1).identity != identity
    assert mixed(texts, conversations, rate=0.4).identity != identity
    assert mixed(conversations, texts).identity != identity


def test_the_identity_changes_with_the_store_that_an_objective_draws_from(tmp_path, conversations):
    names = []
    for word in (100, 200):
        shutil.rmtree(tmp_path / "pool", ignore_errors=True)
        store_of(tmp_path / "pool", [calls(word, 2)])
        inner = Recover(pool=str(tmp_path / "pool"))
        objective = Mixture((NextToken(), inner), (0.5, 0.5))
        source = Source("c", conversations, objective)
        names.append(MixturePipeline([source], 1, 128, 0).identity)
    changed = [name for name in names[0] if names[0][name] != names[1][name]]
    assert changed == ["plan of dataset 0", f"store {tmp_path}/pool that dataset 0 draws from"]


@dataclasses.dataclass(frozen=True)
class AsLongAsItsPool:
    """Asks for as much room as the first document of a pool takes."""

    pool: str

    def room(self, trajectory):
        return int(TokenStore.open(self.pool).lengths[0])


def test_a_pool_that_was_built_again_is_planned_for(tmp_path):
    store = store_of(tmp_path / "store", [text(range(20))])
    for length in (3, 5):
        shutil.rmtree(tmp_path / "pool", ignore_errors=True)
        store_of(tmp_path / "pool", [text(range(length))])
        plan = plan_of(store, AsLongAsItsPool(str(tmp_path / "pool")), 40)
        assert plan.fill == (19 + length) / 40


def test_a_pool_of_another_tokenizer_is_refused_before_rows_are_planned(tmp_path, conversations):
    TokenStore.write(tmp_path / "pool", [calls(100, 2)], "another")
    source = Source("c", conversations, Recover(pool=str(tmp_path / "pool"), longest=9999))
    with pytest.raises(ValueError, match=r"pool was written with another tokenizer \(.*another, n"):
        MixturePipeline([source], 1, 128, 0)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_a_share_that_would_drop_a_source_is_refused(texts, share):
    with pytest.raises(ValueError, match=f"source 't' has a share of {share}"):
        MixturePipeline([Source("t", texts, PlainText(), share)], 4, 64, 0)


def test_mixtures_that_hold_nothing_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="at least one source"):
        MixturePipeline([], 4, 64, 0)
    with pytest.raises(ValueError, match="a batch of 0 rows of 64 places holds nothing"):
        MixturePipeline([Source("t", texts, PlainText())], 0, 64, 0)
    lonely = store_of(tmp_path, [text([1]), text([2])])
    with pytest.raises(ValueError, match="has no trajectory of more than one token"):
        plan_rows(lonely, PlainText(), 64)


def test_rows_too_short_for_the_objective_are_refused(conversations):
    with pytest.raises(ValueError, match=re.escape("reserves 4 places in rows of 4")):
        plan_rows(conversations, InfillCall(rate=1.0), 4)


def test_prefetching_yields_the_same_batches_in_order(texts, conversations):
    pipeline = mixed(texts, conversations)
    found = list(prefetch(pipeline.batch, 3, 8))
    assert [step for step, _ in found] == [3, 4, 5, 6, 7]
    for step, batch in found:
        jax.tree.map(np.testing.assert_array_equal, batch, pipeline.batch(step))


def test_prefetching_says_what_it_waited_for():
    release = threading.Event()
    batches = prefetch(lambda step: release.wait(20), 5, 6, timeout_s=0.1)
    with pytest.raises(TimeoutError, match=r"waited 0\.1 s for the data pipeline to make batch 5"):
        next(batches)
    release.set()


def test_an_error_while_prefetching_is_raised_where_the_batch_is_used():
    def make(step):
        if step == 2:
            raise ValueError("row 7 is damaged")
        return step

    batches = prefetch(make, 0, 5)
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="row 7 is damaged"):
        next(batches)


def test_the_thread_ends_when_prefetching_stops_early():
    before = threading.active_count()
    batches = prefetch(lambda step: step, 0, 10**9)
    assert next(batches) == (0, 0)
    assert threading.active_count() == before + 1
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
