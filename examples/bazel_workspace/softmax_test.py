"""The kernel under jax.jit: in the interpreter, and on a GPU where there is one."""

import os
import unittest

os.environ.setdefault("TK_JAX_CACHE_DIR", "off")

import _softmax
import jax
import jax.numpy as jnp
import numpy as np
import softmax

# A whole block of rows, a part of one, and several.
ROWS = (64, 1, 200)


class SoftmaxTest(unittest.TestCase):
    def check(self, device):
        for rows in ROWS:
            with self.subTest(rows=rows), jax.default_device(device):
                x = 4 * jax.random.normal(jax.random.key(rows), (rows, 128))
                x = x.astype(jnp.bfloat16)
                got = jax.jit(softmax.softmax)(x)
                self.assertEqual((got.shape, got.dtype), (x.shape, x.dtype))
                exact = jax.nn.softmax(x.astype(jnp.float32))
                # Half of bfloat16's last bit, and a little for the sum.
                np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8)

    def test_in_the_interpreter(self):
        self.check(jax.devices("cpu")[0])

    def test_on_a_gpu(self):
        try:
            device = jax.devices("cuda")[0]
        except RuntimeError:
            self.skipTest("jax finds no CUDA GPU")
        self.check(device)

    def test_compiles_for_the_gpu(self):
        if not _softmax.has_nvrtc():
            self.skipTest("NVRTC is not installed")
        self.assertGreater(_softmax.compile_for_gpu(), 1000)

    def test_lowers_for_the_gpu(self):
        x = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)
        traced = jax.jit(softmax.softmax).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("@example_softmax", text)

    def test_a_wrong_shape_is_an_error(self):
        with self.assertRaisesRegex(ValueError, r"expected \[rows, 128\] and bfloat16"):
            softmax.softmax(jnp.ones((64, 96), jnp.bfloat16))


if __name__ == "__main__":
    unittest.main()
