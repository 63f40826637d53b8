"""What the rule tk_cubins runs: `python -m tk_jax.compile`, as a program of Bazel."""

import sys

from tk_jax import compile

if __name__ == "__main__":
    sys.exit(compile.main())
