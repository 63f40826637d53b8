#!/bin/sh
# Builds and tests everything with Bazel, this workspace and the example beside it, without network.
#
#   scripts/bazel_test.sh [--no-install] PYTHON [FLAG...]
#
# PYTHON is an interpreter with what the extra "test" names; flags are for bazel test in this workspace.
# Installs Debian's Bazel where there is none and this may. Where it cannot be had, says so and how
# many test targets that leaves out, and succeeds.
set -eu
cd "$(dirname "$0")/.."

mkdir -p build
install=yes
[ "$1" != --no-install ] || { install=no; shift; }
TK_PYTHON="$1"
export TK_PYTHON
shift

skip() {
  # Those without the tag "slow".
  slow=$(sed -n '/^_\(XLA_ALONE\|KERNELS_WHEN_CALLED\)/,/^]/s/.*"\(test_.*\)".*/-e \1.py/p' tests/BUILD.bazel)
  count=$(ls tests/test_*.py tests/interpreter/*.cc bazel/*_test.py examples/bazel_workspace/*_test.py |
    grep -v -e _gpu -e test_mutations $slow | wc -l)
  echo "Bazel: $count test targets skipped: $1"
  exit 0
}

if ! command -v bazel >/dev/null; then
  [ "$install" = yes ] || skip "there is no bazel; make bazel-test installs it"
  command -v apt-get >/dev/null || skip "there is no bazel, and no apt-get to install it with"
  [ "$(id -u)" = 0 ] || skip "there is no bazel; install it: sudo apt-get install bazel-bootstrap"
  echo "Bazel: installing Debian's bazel-bootstrap"
  { apt-get update && apt-get install --yes --no-install-recommends bazel-bootstrap; } \
    >build/bazel-install.log 2>&1 ||
    skip "bazel-bootstrap cannot be installed (build/bazel-install.log)"
fi

# A server from before would be reached over a network that is about to be gone.
run() {
  folder="$1"
  shift
  (cd "$folder" && bazel shutdown >/dev/null 2>&1 || true)
  if unshare --net true 2>/dev/null; then
    unshare --net "$TK_PYTHON" scripts/loopback.py sh -c "cd $folder && bazel test $* //... && bazel shutdown"
  else
    echo "Bazel: tests have no network; building them has, as unshare is not permitted here"
    (cd "$folder" && bazel test "$@" //... && bazel shutdown)
  fi
}

run . "$@"
run examples/bazel_workspace
