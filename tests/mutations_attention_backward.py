"""Ways to break attention's backward kernels, up to a head dim of 128."""

from tests.mutation import Mutation

_BACKWARD = "kernels/attention/backward.cuh"
_WALK = "kernels/attention/backward_walk.cuh"
_TURNS = "kernels/attention/turns.cuh"
_PREPARE = "kernels/attention/backward_prepare.cuh"
_FINISH = "kernels/attention/backward_finish.cuh"
_DK_WAIT = "warpgroup::mma_wait<0>(dk_acc, ds);"
_Q_RELEASE = "shared.q_ring.release(state);"


def _backward(what, old, new="", after="", file=_BACKWARD):
    return Mutation(what, "attention_backward", file, old, new, after)


MUTATIONS = [
    _backward(
        "dq's product before all rows of ds are there",
        "named_sync(kDsWritten, 128 * kConsumers);",
    ),
    _backward(
        "ds is not published to the tensor cores",
        "publish_shared();",
        after="ds_buffer ^= 1;",
    ),
    _backward("one buffer for ds instead of two", "ds_buffer ^= 1;"),
    _backward(
        "p overwritten while dv's product reads it",
        "mma_wait<2>(dv_acc, p)",
        "mma_wait<2>(dv_acc)",
    ),
    _backward("dq used before its wait", "mma_wait<1>(dq_acc)", "mma_wait<2>(dq_acc)"),
    _backward("dp used before its wait", "warpgroup::mma_wait<0>(dp_acc);"),
    _backward(
        "dq overwritten on its way out", "shared.leaving_ring.acquire(out_state);"
    ),
    _backward(
        "q released before its product is done",
        _DK_WAIT + "\n        " + _Q_RELEASE,
        _Q_RELEASE + "\n        " + _DK_WAIT,
    ),
    _backward("ds overwritten while dk's product reads it", _DK_WAIT),
    _backward("dout never released", "shared.dout_ring.release(state);"),
    _backward("no wait for q and lse", "shared.q_ring.wait(state);"),
    _backward("no wait for dout and delta", "shared.dout_ring.wait(state);"),
    _backward("no wait for k", "shared.k_ring.wait(kv_state);"),
    _backward("no wait for v", "shared.v_ring.wait(kv_state);"),
    _backward("k never released", "shared.k_ring.release(kv_state);"),
    _backward("v never released", "shared.v_ring.release(kv_state);"),
    _backward(
        "dv overwrites dq on its way out",
        "shared.leaving_ring.acquire(out_state);",
        after="shared.v_ring.release(kv_state);",
    ),
    _backward(
        "dk overwrites dv on its way out",
        "shared.leaving_ring.acquire(out_state);",
        after="(!kLeaveTogether) {\n        shared.leaving_ring.hand_over",
    ),
    _backward(
        "dv and dk are not handed over",
        "shared.leaving_ring.hand_over(out_state);",
        after="dkv[kLast], dk_acc);",
    ),
    _backward(
        "dv and dk leave before they are there",
        "shared.leaving_ring.wait(state);",
        after="static void store_tile",
    ),
    _backward(
        "dv and dk given back while they are read",
        "tma::wait_read<0>();",
        after="tma::store(params.dk",
    ),
    _backward(
        "both storers send dv",
        "if (step == storer) store_tile",
        "store_tile",
    ),
    _backward(
        "storers are not told of tiles",
        "shared.messages.init(4 * kConsumers + kStorers);",
        "shared.messages.init(4 * kConsumers);",
    ),
    _backward(
        "every block takes the first tile",
        "take_number(params.next_tile)",
        "(take_number(params.next_tile), 0)",
        file=_WALK,
    ),
    _backward("no turns", "take_turn(counter, turn);"),
    _backward("the turn is not passed on", "pass_turn(counter);"),
    _backward(
        "the turn is passed on before dq is written",
        "tma::wait<0>();\n      pass_turn",
        "pass_turn",
    ),
    _backward("every block overwrites dq", "if (turn == 0)", "if (turn >= 0)"),
    _backward("no block overwrites what dq held", "if (turn == 0)", "if (turn < 0)"),
    _backward(
        "dq given back while it is read",
        "tma::wait_read<0>();\n    shared.leaving_ring",
        "shared.leaving_ring",
    ),
    _backward(
        "bytes of lse are not expected",
        "acquire(state, QTile::kBytes + QVec::kBytes)",
        "acquire(state, QTile::kBytes)",
    ),
    _backward("delta of the wrong rows", "params.delta + row", "params.delta"),
    _backward("no mask", "if (masked) {", "if (false) {"),
    _backward(
        "keys before the window are seen",
        "first_query + kBlockQ - 1 + bounds.first_offset > first_key",
        "false",
    ),
    _backward(
        "the last queries are left out",
        "return q_blocks - first_q_block(n);",
        "return q_blocks - first_q_block(n) - 1;",
        file=_TURNS,
    ),
    _backward(
        "a causal key block waits for a turn that nobody passes",
        "- 1 - n : n;",
        "- 1 - n : n + 1;",
        file=_TURNS,
    ),
    _backward(
        "turns of a wave that goes down go down, as its blocks do not start",
        "- 1 - n : n;",
        "- 1 - n : kv_blocks - 1 - n;",
        file=_TURNS,
    ),
    _backward(
        "turns of a wave that goes up start with those of its end that see nothing",
        "min(wave.end, visible_end(m))",
        "wave.end",
        file=_TURNS,
    ),
    _backward(
        "queries of a wave that goes down are copied upwards",
        "int m = turns.wave.up ? first : first + steps - 1;",
        "int m = first;",
        file=_WALK,
    ),
    _backward(
        "queries of a wave that goes up are copied downwards",
        "const int way = turns.wave.up ? 1 : -1;",
        "const int way = -1;",
        file=_WALK,
    ),
    _backward(
        "tiles are dealt out where another call has stopped",
        "reset_turns(params.next_tile);",
        file=_PREPARE,
    ),
    _backward("two storers take every step", "if (step == storer)", "if (true)"),
    _backward(
        "prepare's barrier is not published", "publish_barriers();", file=_PREPARE
    ),
    _backward(
        "prepare's barrier used before it is there", "block::sync();", file=_PREPARE
    ),
    _backward("prepare does not wait for out", "shared.full.wait(0);", file=_PREPARE),
    _backward(
        "turns are not reset",
        "if (warpgroup::leader()) reset_turns",
        "if (false) reset_turns",
        file=_PREPARE,
    ),
    _backward("finish does not publish dq", "publish_shared();", file=_FINISH),
    _backward(
        "finish copies before all warps have written",
        "warpgroup::sync();",
        file=_FINISH,
    ),
    _backward("finish exits while dq is read", "tma::wait_read<0>();", file=_FINISH),
    _backward(
        "finish takes the wrong part",
        "cols<64>(part)",
        "cols<64>(part + 1)",
        file=_FINISH,
    ),
]
