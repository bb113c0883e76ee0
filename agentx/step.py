"""The one train step: (state, batch) -> (state, metrics), for every kind of training.

Hidden states by the model, log-probabilities of the targets, a loss per target, a sum over the
whole batch divided by the sum of all its weights, one update. The batch may be cut into
micro-batches that are computed one after the other; since the divisor is the whole batch's, that
changes nothing.

Everything is compiled once with its shardings: parameters and optimizer moments as
`sharding.tree_shardings` lays them, the batch over its rows and tokens.

Legend: B rows, S tokens a row, M micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agentx.batch import Batch
from agentx.losses import Loss
from agentx.model.lora import init_adapters, split_trained
from agentx.model.moe import Routing, move_correction_biases, router_metrics
from agentx.model.transformer import Transformer, init_params
from agentx.optim import Optimizer
from agentx.sharding import batch_sharding, check_batch, constrain, tree_shardings
from agentx_kernels.hardware import compiler_options

Array = jax.Array
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """step: i32[], updates made so far. params: nnx.State, of a model with adapters these alone.
    opt_state: optax's, of params."""

    step: Any
    params: nnx.State
    opt_state: Any


class Scored(NamedTuple):
    """Log-probabilities of the batch's targets and entropies, f32[B, S] each; and where tokens went
    of the layers with experts, stacked, its tokens in an order of their own; None without."""

    logprobs: Array
    entropy: Array
    routing: Routing | None


def token_logprobs(model: Transformer, batch: Batch, temperature: float) -> Scored:
    """What the model makes of a batch.

    It is computed in an order in which attention has as much to do on every device, and comes in
    the order of the batch.
    """
    order_BS = model.balanced_order(batch.layout)
    inputs = batch.tokens, batch.layout, batch.targets, batch.experts
    if order_BS is not None:
        inputs = jax.tree.map(lambda x_BS: _ordered(x_BS, order_BS), inputs)
    tokens_BS, layout, targets_BS, experts = inputs
    hidden_BSD, routing = model(tokens_BS, layout, experts)
    outputs = model.token_logprobs(hidden_BSD, targets_BS, temperature)
    if order_BS is None:
        return Scored(*outputs, routing)
    back_BS = jnp.argsort(order_BS)
    logprobs_BS, entropy_BS = (_ordered(x_BS, back_BS) for x_BS in outputs)
    return Scored(logprobs_BS, entropy_BS, routing)


def make_train_step(
    model: Transformer,
    loss: Loss,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    num_micro_batches: int = 1,
    temperature: float = 1.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step of a model (which may be abstract), jitted: (state, batch) -> (state, metrics).

    It donates the state. Of a model with adapters (`lora.adapted`) it is (state, batch, frozen),
    where frozen is the other parameters, as `split_trained` has them: they are read, not changed.

    num_micro_batches: into how many parts the rows are cut, to save memory.
    temperature: what logits are divided by; a policy's is the one it samples with.

    Metrics, f32[] each: loss; weight_sum, the sum of weights; tokens, how many had weight;
    grad_norm, before clipping; learning_rate; nonfinite/GROUP, 1 where the norm of the gradients of
    a top-level group of parameters is a NaN or infinite; and the loss's own. A batch without
    weight has loss 0 and gradients of 0. Of a model with experts those of `router_metrics` too.

    The step raises ValueError where the batch does not divide evenly over micro-batches and
    devices. The jitted function behind that check is its `__wrapped__`, to compile ahead of time.
    """
    graphdef, abstract_params, *abstract_frozen = split_trained(model)

    def micro_batch_loss(params: nnx.State, frozen: Any, batch: Batch, normaliser: Array) -> Any:
        scored = token_logprobs(nnx.merge(graphdef, params, *frozen), batch, temperature)
        values_BS, metrics = loss(scored.logprobs, scored.entropy, batch)
        total = jnp.sum(values_BS * batch.weights, where=batch.weights > 0) / normaliser
        if scored.routing is None:
            return total, (metrics, None)
        routing = scored.routing._replace(chosen=None)
        balance = jnp.sum(routing.balance_loss) / num_micro_batches
        return total + balance, (metrics, routing)

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        weight_sum = jnp.sum(batch.weights)
        normaliser = jnp.where(weight_sum > 0, weight_sum, 1)

        def accumulate(carry, micro_batch):
            (value, others), grads = jax.value_and_grad(micro_batch_loss, has_aux=True)(
                state.params, frozen, micro_batch, normaliser
            )
            return jax.tree.map(jnp.add, carry, (value, grads)), others

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            micro_batches_MBS = jax.tree.map(lambda x: _cut(x, num_micro_batches), batch)
            (value, grads), others = lax.scan(accumulate, nothing, micro_batches_MBS)
            loss_metrics, routing = others
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if routing is not None and not frozen:
                move_correction_biases(params, model.config, routing.tokens_E.sum(0))
        squares = {group: optax.tree.norm(g, squared=True) for group, g in grads.items()}
        metrics = {
            "loss": value,
            "weight_sum": weight_sum,
            "tokens": jnp.sum(batch.weights > 0, dtype=jnp.float32),
            "grad_norm": jnp.sqrt(jnp.sum(jnp.stack(list(squares.values())))),
            "learning_rate": jnp.float32(optimizer.learning_rate(state.step)),
            **{
                f"nonfinite/{group}": 1.0 - jnp.isfinite(square)
                for group, square in squares.items()
            },
            **{name: metric.result() for name, metric in loss_metrics.items()},
            **(router_metrics(routing) if routing is not None else {}),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    state_shardings = tree_shardings(_abstract_state(abstract_params, optimizer), mesh)
    jitted = jax.jit(
        train_step,
        in_shardings=(
            state_shardings,
            batch_sharding(mesh),
            *tree_shardings(abstract_frozen, mesh),
        ),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=compiler_options(model.hardware),
    )
    return _checked(jitted, mesh, num_micro_batches)


def make_score_step(
    model: Transformer, mesh: Mesh, *, temperature: float = 1.0
) -> Callable[..., tuple[Array, Array]]:
    """A jitted (params, batch) -> (logprobs, entropy), f32[B, S] each, of the batch's targets.

    For `Batch.old_logprobs` and, with frozen parameters, `Batch.reference_logprobs`. Of a model
    with adapters it is (params, batch, frozen), as the train step. Raises ValueError as that does.
    """
    graphdef, abstract_params, *abstract_frozen = split_trained(model)

    def score_step(params: nnx.State, batch: Batch, *frozen: Any) -> tuple[Array, Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            scored = token_logprobs(nnx.merge(graphdef, params, *frozen), batch, temperature)
            return scored.logprobs, scored.entropy

    rows, frozen_shardings = batch_sharding(mesh), tree_shardings(abstract_frozen, mesh)
    jitted = jax.jit(
        score_step,
        in_shardings=(tree_shardings(abstract_params, mesh), rows, *frozen_shardings),
        out_shardings=rows,
        compiler_options=compiler_options(model.hardware),
    )
    return _checked(jitted, mesh, 1)


def init_state(model: Transformer, optimizer: Optimizer, mesh: Mesh, key: Array) -> TrainState:
    """A fresh state, born sharded: no parameter is ever whole on a device that holds a part.

    Of a model with adapters, of these alone: the others come from elsewhere. The values depend on
    the key alone, not on the mesh.
    """

    has_adapters = len(split_trained(model)) > 2

    def init(key: Array) -> TrainState:
        params = init_adapters(model, key) if has_adapters else init_params(model, key)
        return TrainState(jnp.int32(0), params, optimizer.transform.init(params))

    return jax.jit(init, out_shardings=tree_shardings(jax.eval_shape(init, key), mesh))(key)


def abstract_state(model: Transformer, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The shapes, types and shardings of `init_state`'s arrays: what a checkpoint restores into."""
    state = _abstract_state(split_trained(model)[1], optimizer)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        tree_shardings(state, mesh),
    )


def _checked(jitted: Any, mesh: Mesh, num_micro_batches: int) -> Any:
    """`jitted` (state, batch, ...), which first says in one sentence if the batch does not
    divide."""

    @functools.wraps(jitted)
    def step(state: Any, batch: Batch, *frozen: Any) -> Any:
        check_batch(batch.tokens.shape, mesh, num_micro_batches)
        return jitted(state, batch, *frozen)

    return step


def _abstract_state(abstract_params: nnx.State, optimizer: Optimizer) -> TrainState:
    step = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.transform.init, abstract_params)
    return TrainState(step, abstract_params, opt_state)


def _ordered(x_BS: Array, order_BS: Array) -> Array:
    """Each row in its order, laid out like the batch."""
    ordered_BS = x_BS.at[jnp.arange(len(x_BS))[:, None], order_BS].get(
        unique_indices=True, mode="promise_in_bounds"
    )
    return constrain(ordered_BS, "batch", "sequence", *[None] * (x_BS.ndim - 2))


def _cut(x_BS: Array, num_micro_batches: int) -> Array:
    """[B, S] -> [M, B / M, S]. Every M-th row, so that each device keeps the rows it has."""
    return x_BS.reshape(-1, num_micro_batches, *x_BS.shape[1:]).swapaxes(0, 1)
