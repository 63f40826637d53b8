"""What tk_cubins compiled is found, without NVRTC; nothing else is."""

import os
import unittest

# Opened when a kernel has to be compiled.
os.environ["TK_JAX_NVRTC"] = "/nothing.so"
os.environ["TK_JAX_CACHE_DIR"] = "off"

from tk_jax import _ffi, compile


class CubinsTest(unittest.TestCase):
    def test_shipped_kernels_need_no_compiler(self):
        finish = list(compile.specialisations("attention_bwd_finish_d64_bf16"))
        prepare = list(compile.specialisations("attention_bwd_prepare"))
        self.assertEqual(len(finish), 1)
        self.assertGreater(len(prepare), 1)
        kernels = compile.compile_kernels(finish + prepare)
        self.assertEqual({kernel.origin for kernel in kernels}, {"shipped"})
        cubin = _ffi.extension().compile(finish[0].spec)["cubin"]
        self.assertTrue(cubin.startswith(b"\x7fELF"))

    def test_others_do(self):
        others = list(compile.specialisations("attention_bwd_finish_d64_fp16"))
        with self.assertRaisesRegex(RuntimeError, "NVRTC"):
            compile.compile_kernels(others)


if __name__ == "__main__":
    unittest.main()
