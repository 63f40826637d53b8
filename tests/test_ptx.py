"""The emulator of PTX itself: what it computes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tk_jax.kernel import call_kernel

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="runs on the CPU alone"),
    pytest.mark.usefixtures("ptx"),
]

PRELUDE = """
#include "tk/kernel_params.h"
#include "tk/tk.cuh"
namespace mine {
template <typename T>
__device__ T* data(const tk::KernelParams& p, int i) {
  return static_cast<T*>(p.buffers[i].data);
}
__device__ void run(const tk::KernelParams& p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
"""


def run(body, out, *arrays, **settings):
    """Runs ``body`` in each thread; results are buffers ``arrays[len(arrays):]``."""
    (result,) = call_kernel(
        "mine::run",
        [jax.ShapeDtypeStruct(*out)],
        *map(jnp.asarray, arrays),
        source=PRELUDE + body + "}\n}\n",
        implementation="interpret",
        **{"threads": 96, **settings},
    )
    return np.asarray(result)


def signed(values):
    return np.asarray(values, np.int64).astype(np.int32)


def test_bits_of_integers(rng):
    x = signed(rng.integers(-(2**31), 2**31, 96))
    x[:4] = 0, 1, -1, -(2**31)
    y = signed(rng.integers(-40, 41, 96))
    y[y == 0] = 7
    got = run(
        """
        const int x = data<int>(p, 0)[i], y = data<int>(p, 1)[i];
        const unsigned u = x, by = y & 63;
        unsigned* out = data<unsigned>(p, 2) + 14 * i;
        out[0] = x / y;
        out[1] = x % y;
        out[2] = __clz(x);
        out[3] = __ffs(x);
        out[4] = __popc(u);
        out[5] = __brev(u);
        out[6] = __umulhi(u, 0x9e3779b9u);
        out[7] = __mulhi(x, y);
        asm("prmt.b32 %0, %1, %2, 0x70c5;" : "=r"(out[8]) : "r"(u), "r"(0x01020384));
        out[9] = __funnelshift_l(u, y, by);
        asm("shl.b32 %0, %1, %2;" : "=r"(out[10]) : "r"(u), "r"(by));
        asm("shr.s32 %0, %1, %2;" : "=r"(out[11]) : "r"(u), "r"(by));
        out[12] = __mul64hi(x * 0x1234567LL, y * 0x3456789abcdeLL);
        out[13] = __umul64hi(u * 0x1234567ULL, 0xfedcba9876543210ULL);
        """,
        ((96, 14), np.uint32),
        x,
        y,
    )
    for row, a, b in zip(got.tolist(), x.tolist(), y.tolist(), strict=True):
        u, by = a % 2**32, b & 63
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        bits = f"{u:032b}"
        bytes_ = u.to_bytes(4, "little") + (0x01020384).to_bytes(4, "little")
        sign = 255 if bytes_[4] & 128 else 0
        permuted = [bytes_[5], sign, bytes_[0], bytes_[7]]
        wide = (b % 2**32) << 32 | u
        assert row == [
            quotient % 2**32,
            (a - quotient * b) % 2**32,
            len(bits) - len(bits.lstrip("0")),
            0 if u == 0 else len(bits) - len(bits.rstrip("0")) + 1,
            bits.count("1"),
            int(bits[::-1], 2),
            u * 0x9E3779B9 >> 32,
            (a * b >> 32) % 2**32,
            int.from_bytes(permuted, "little"),
            (wide << (by & 31) >> 32) % 2**32,
            (u << by) % 2**32 if by < 32 else 0,
            (a >> min(by, 31)) % 2**32,
            (a * 0x1234567 * (b * 0x3456789ABCDE) >> 64) % 2**32,
            (u * 0x1234567 * 0xFEDCBA9876543210 >> 64) % 2**32,
        ], (a, b)


def test_floats_and_conversions(rng):
    x = (rng.standard_normal(96) * 2.0 ** rng.integers(-130, 130, 96)).astype(
        np.float32
    )
    x[:6] = 0.0, -0.0, np.inf, -np.inf, np.nan, 2.5
    got = run(
        """
        const float x = data<float>(p, 0)[i];
        float* out = data<float>(p, 1) + 8 * i;
        out[0] = __float2int_rz(x);
        out[1] = __float2int_rn(x);
        out[2] = fmaxf(x, 1.0f);
        out[3] = tk::ptx::max_nan(x, 1.0f);
        out[4] = tk::ptx::to_float(tk::ptx::from_float<tk::bf16>(x));
        out[5] = tk::ptx::to_float(tk::ptx::from_float<tk::fp16>(x));
        out[6] = x < 2.0f ? 1.0f : 0.0f;
        out[7] = !(x >= 2.0f) ? 1.0f : 0.0f;
        """,
        ((96, 8), np.float32),
        x,
    )
    with np.errstate(all="ignore"):
        most = np.clip(np.nan_to_num(x, nan=0), -(2.0**31), 2.0**31 - 1)
        expected = [
            np.trunc(most),
            np.rint(most),
            np.fmax(x, 1),
            np.maximum(x, 1),
            x.astype(jnp.bfloat16),
            x.astype(np.float16),
            x < 2,
            ~(x >= 2),
        ]
    columns = [np.asarray(column, np.float32) for column in expected]
    np.testing.assert_array_equal(got, np.stack(columns, 1))


def test_lanes_that_part_and_meet_again():
    """Loops of different lengths, and what a warp exchanges after them."""
    got = run(
        """
        __shared__ int sums[3];
        int steps = 0;
        for (int n = i % 32 + 1; n != 1; ++steps) n = n % 2 ? 3 * n + 1 : n / 2;
        int kept[4] = {steps, i, 2 * i, 3 * i};
        for (int j = 0; j < i % 4; ++j) kept[(i + j) % 4] += j;
        const int sum = tk::ptx::shuffle_xor(steps, 1) + steps;
        if (threadIdx.x % 32 == 5) sums[threadIdx.x / 32] = steps;
        __syncthreads();
        int* out = data<int>(p, 0) + 6 * i;
        out[0] = steps;
        out[1] = sum;
        out[2] = tk::ptx::shuffle_up(steps, 3);
        out[3] = __ballot_sync(0xffffffffu, steps > 10);
        out[4] = kept[steps % 4];
        out[5] = sums[(threadIdx.x / 32 + 1) % 3];
        """,
        ((192, 6), np.int32),
        grid=2,
    )
    steps = []
    for number in range(1, 33):
        count = 0
        while number != 1:
            number = 3 * number + 1 if number % 2 else number // 2
            count += 1
        steps.append(count)
    votes = sum((count > 10) << lane for lane, count in enumerate(steps))
    for i, row in enumerate(got.tolist()):
        lane = i % 32
        kept = [steps[lane], i, 2 * i, 3 * i]
        for j in range(i % 4):
            kept[(i + j) % 4] += j
        assert [value % 2**32 for value in row] == [
            steps[lane],
            steps[lane] + steps[lane ^ 1],
            steps[lane - 3] if lane >= 3 else steps[lane],
            votes,
            kept[steps[lane] % 4],
            steps[5],
        ]


def test_warps_that_reach_a_barrier_one_after_another_leave_it_together():
    """What follows wants the whole warpgroup at once."""
    got = run(
        """
        int sum = 0;
        asm volatile(
            "{ .reg .pred p; .reg .s32 turn; mov.s32 turn, 0;\\n"
            "AGAIN: bar.sync 0;\\n"
            "wgmma.fence.sync.aligned;\\n"
            "add.s32 %0, %0, 1;\\n"
            "add.s32 turn, turn, 1;\\n"
            "setp.eq.s32 p, turn, 4; @p bra DONE;\\n"
            "setp.lt.s32 p, %1, 64; @p bra AGAIN;\\n"
            "add.s32 %0, %0, 10;\\n"
            "bra AGAIN;\\n"
            "DONE: }" : "+r"(sum) : "r"(i));
        data<int>(p, 0)[i] = sum;
        """,
        ((128,), np.int32),
        threads=128,
    )
    np.testing.assert_array_equal(got, [4] * 64 + [34] * 64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("data<int>(p, 0)[i + 1] = 1;", "in no array of the call"),
        ("*(int*)((char*)data<int>(p, 0) + 2) = 1;", "misaligned"),
        ('asm volatile("bar.sync 1, 128;");', "deadlock.*bar.sync"),
        ('asm volatile("bar.sync 1, 64;");', "96 of 64 threads"),
        ("tk::ptx::mbarrier_arrive(1024);", "no mbarrier was made"),
        (
            "if (i != 0) return;"
            "tk::ptx::mbarrier_init(1024, 1);"
            "tk::ptx::mbarrier_arrive(1024);"
            "tk::ptx::mbarrier_wait(1024, 0);"
            "tk::ptx::mbarrier_wait(1024, 1);",
            "(?s)deadlock.*mbarrier",
        ),
        ("if (i == 0) __syncwarp(); else __trap();", "trap"),
    ],
    ids=["bounds", "alignment", "hang", "arrivals", "barrier", "phase", "unknown"],
)
def test_what_is_refused(body, message):
    with pytest.raises(Exception, match=message):
        run(body, ((96,), np.int32), shared_bytes=1024)
