#!/bin/sh
# Prints the newest Python this project runs on, or the one of the version given: `find_python.sh 3.12`.
#
# Looks on PATH, then among pyenv's versions. A candidate must run (pyenv leaves launchers on PATH
# for versions that are not active), make virtual environments and have its headers (Debian packs
# both apart).
set -u

wanted="${1:-3.13 3.12 3.11}"

usable() {  # usable COMMAND VERSION
  "$1" -c "
import ensurepip, os, sys, sysconfig, venv
headers = os.path.join(sysconfig.get_path('include'), 'Python.h')
right = '%d.%d' % sys.version_info[:2] == '$2'
raise SystemExit(not (right and os.path.exists(headers)))" >/dev/null 2>&1
}

for version in $wanted; do
  for candidate in "python$version" python3 python \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if usable "$candidate" "$version"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      exit 0
    fi
  done
done
echo "no Python $wanted with venv, ensurepip and headers: install one" \
  "(Debian: apt-get install python3-venv python3-dev), or name it: make PYTHON=/path/to/python" >&2
exit 1
