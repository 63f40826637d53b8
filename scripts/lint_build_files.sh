#!/bin/sh
# Fails where buildifier would write a BUILD file in another way. It comes from npm; where it cannot
# be had, says so, and succeeds.
set -eu
cd "$(dirname "$0")/.."

buildifier=build/buildifier/node_modules/.bin/buildifier
install_buildifier() {
  command -v npm >/dev/null &&
    npm install --silent --no-save --prefix build/buildifier @bazel/buildifier@8.2.1
}
if [ -x "$buildifier" ] || install_buildifier; then
  git ls-files '*.bzl' '*.bazel' WORKSPACE '*/WORKSPACE' |
    xargs "$buildifier" -mode=check -lint=warn \
      -warnings=-native-py,-native-cc-common,-native-cc-info,-unnamed-macro
else
  echo "Bazel: BUILD files not linted: buildifier cannot be installed from npm"
fi
