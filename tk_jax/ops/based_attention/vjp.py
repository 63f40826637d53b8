"""Based attention by kernels: what stands between the public arrays and theirs.

The platform is chosen, and the arrays alone kept for the backward pass, by linear
attention's ``vjp.differentiable``.
"""

from __future__ import annotations

import functools

import jax

from tk_jax.ops import _chunks
from tk_jax.ops.based_attention import config, order, scan
from tk_jax.ops.linear_attention import quotient
from tk_jax.ops.linear_attention.config import LinearAttentionOptions
from tk_jax.ops.linear_attention.vjp import document_starts, pad_columns


def kernel_based_attention(
    options: LinearAttentionOptions,
    return_state: bool,
    q,
    k,
    v,
    log_decay,
    state,
    segment_ids,
    *,
    tiles: config.ScanConfig | None = None,
):
    """As ``linear_attention.xla.linear_attention`` with the features, by kernels.

    ``log_decay`` is None; ``state`` may be None for zeros, and the state that is
    returned is, unless ``return_state``. ``tiles`` is for tuning.
    """
    del log_decay
    *batch, seqlen, _, dim = q.shape
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    unfold = functools.partial(_chunks.unfold, batch=batch)
    settings = scan.Settings("based_attention", options.scale, return_state, tiles)
    arrays = scan.Arrays(
        *map(fold, (q, k, v)),
        state=jax.tree.map(fold, state),
        starts=document_starts(segment_ids, (*batch, seqlen)),
    )
    if not options.normalize:
        run = _scan
    elif config.walks(dim):
        run = _normalized
    else:
        run = _scan_of_ones
    out, state = run(settings, arrays)
    return unfold(out), jax.tree.map(unfold, state)


# Of these, states are as the public ones but for the folded batch: with normalization
# a pair.


def _scan(settings, arrays):
    dim, value_dim = arrays.q.shape[-1], arrays.v.shape[-1]
    out, state = scan.scan(settings, _to_kernel(arrays))
    if state is not None:
        state = order.to_public(state, dim)[..., :value_dim]
    return out[..., :value_dim], state


def _to_kernel(arrays):
    state, dim = arrays.state, arrays.q.shape[-1]
    if state is not None:
        state = order.to_kernel(pad_columns(state), dim)
    return arrays._replace(v=pad_columns(arrays.v), state=state)


def _scan_of_ones(settings, arrays):
    """The denominators are the outputs of values that are one."""
    state = None if arrays.state is None else quotient.join(*arrays.state)
    given = arrays._replace(v=quotient.with_ones(arrays.v), state=state)
    out, state = _scan(settings, given)
    return quotient.divided(out), None if state is None else quotient.split(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized(settings, arrays):
    """The same, divided where the outputs are.

    A column of ones makes one more slice of values, which costs as much as the others.
    """
    results, _ = scan.normalized(settings, _normalized_to_kernel(arrays))
    return _normalized_to_public(results, arrays)


def _normalized_to_kernel(arrays):
    state, sums = (None, None) if arrays.state is None else arrays.state
    return _to_kernel(arrays._replace(state=state))._replace(sums=sums)


def _normalized_to_public(results, arrays):
    dim, value_dim = arrays.q.shape[-1], arrays.v.shape[-1]
    state = results.state
    if state is not None:
        state = order.to_public(state, dim)[..., :value_dim], results.sums
    return results.out[..., :value_dim], state


def _normalized_fwd(settings, arrays):
    given = _normalized_to_kernel(arrays)
    results, divisors = scan.normalized(settings, given, divisors=True)
    public = _normalized_to_public(results, arrays)
    return public, (arrays, results.out, divisors)


def _normalized_bwd(settings, kept, cotangents):
    arrays, out, divisors = kept
    dout, dstate = cotangents
    # Public arrays are pieces of the kernels', in another order: there and back.
    given, pull_back = jax.vjp(_normalized_to_kernel, arrays._replace(starts=None))
    dstate, dsums = (None, None) if dstate is None else dstate
    if dstate is not None:
        dstate = order.to_kernel(pad_columns(dstate), arrays.q.shape[-1])
    gradients = scan.normalized_gradients(
        settings,
        given._replace(starts=arrays.starts),
        out,
        divisors,
        scan.NormalizedResults(pad_columns(dout), dstate, dsums),
    )
    return pull_back(gradients)


_normalized.defvjp(_normalized_fwd, _normalized_bwd)
