#!/usr/bin/env bash
# bash scripts/test.sh [full] [pytest arguments]
#
# Install what the tests need, then ruff, mypy and pytest: the quick tier, as CI runs it, or with `full` every
# test. Tests marked gpu skip themselves without a CUDA device. All three run; the exit code is 1 if any failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0

tier=(-m "not full")
if [[ ${1:-} == full ]]; then
    tier=()
    shift
fi

bash scripts/setup.sh test,audiocraft
bin=$PWD/.venv/bin
audiocraft=audiocraft==1.3.0 # --no-deps: it pins torch==2.1.0 and more; the extra brings what is used of it
if ! "$bin/python" -c "import importlib.metadata as m; m.version('audiocraft')" 2>/dev/null &&
    ! "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$audiocraft"; then
    printf '%s\n' \
        "!!! pip could not install $audiocraft (its message is above)." \
        "!!! THE INTEROP TESTS ARE SKIPPED: nothing below says that audiocraft can load what is exported." >&2
fi

failed=()
code=()
for path in trainer launch.py; do
    if [[ -e $path ]]; then code+=("$path"); fi
done
for path in scripts/*.py; do
    if [[ -e $path ]]; then code+=("$path"); fi
done

echo "== ruff"
"$bin/ruff" check . || failed+=(ruff)
echo "== mypy"
"$bin/mypy" "${code[@]}" || failed+=(mypy)
echo "== pytest"
"$bin/python" -m pytest ${tier[@]+"${tier[@]}"} "$@" || failed+=(pytest)

printf '== %d min %02d s in all' $((SECONDS / 60)) $((SECONDS % 60))
if ((${#failed[@]})); then
    printf '; FAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '; all passed\n'
