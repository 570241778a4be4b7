#!/usr/bin/env bash
# bash scripts/test.sh [full|numbers] [pytest arguments]
#
# Install what the tests need, then ruff, mypy and pytest: the quick tier, as CI runs it, or with `full` every
# test. Tests marked gpu skip themselves without a CUDA device. All three run; the exit code is 1 if any failed.
# Both tiers run in two workers of one thread each where there are two cores; `-n 0` runs them in one process.
#
# With `numbers` only the quick tests that depend on how the processor rounds, once per setting of its kernels and
# threads, as on machines without its instructions; the closing line names the settings that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0

tier=quick
case ${1:-} in
full | numbers)
    tier=$1
    shift
    ;;
esac

extras=test,audiocraft
if [[ $tier == full ]]; then extras+=,notebook; fi
bash scripts/setup.sh "$extras"
bin=$PWD/.venv/bin
audiocraft=audiocraft==1.3.0 # --no-deps: it pins torch==2.1.0 and more; the extra brings what is used of it
if ! "$bin/python" -c "import importlib.metadata as m; m.version('audiocraft')" 2>/dev/null &&
    ! "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$audiocraft"; then
    printf '%s\n' \
        "!!! pip could not install $audiocraft (its message is above)." \
        "!!! THE INTEROP TESTS ARE SKIPPED: nothing below says that audiocraft can load what is exported." >&2
fi

cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 2 ? 0 : 2))
failed=()

# run NAME COMMAND...: one part, by its name in the closing line
run() {
    echo "== $1"
    "${@:2}" || failed+=("$1")
}

# numbers_under SETTING [VARIABLE=VALUE...] -- PYTEST_ARGUMENT...
numbers_under() {
    local name=$1 variables=()
    shift
    while [[ $1 != -- ]]; do
        variables+=("$1")
        shift
    done
    run "numbers, $name" env ${variables[@]+"${variables[@]}"} "$bin/python" -m pytest -m "numbers and not full" "${@:2}"
}

if [[ $tier == numbers ]]; then
    # Tests of several ranks give each rank one thread; the others obey OMP_NUM_THREADS.
    numbers_under "1 thread" OMP_NUM_THREADS=1 -- -n "$workers" "$@"
    numbers_under "2 threads" OMP_NUM_THREADS=2 -- "$@"
    numbers_under "AVX2" OMP_NUM_THREADS=1 \
        ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 -- -n "$workers" "$@"
    numbers_under "no vector kernels of torch" OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default -- -n "$workers" "$@"
else
    code=()
    for path in trainer launch.py; do
        if [[ -e $path ]]; then code+=("$path"); fi
    done
    for path in scripts/*.py; do
        if [[ -e $path ]]; then code+=("$path"); fi
    done
    run ruff "$bin/ruff" check .
    run mypy "$bin/mypy" "${code[@]}"
    marks=()
    if [[ $tier == quick ]]; then marks=(-m "not full"); fi
    run pytest env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
        "$bin/python" -m pytest ${marks[@]+"${marks[@]}"} -n "$workers" "$@"
fi

printf '== %d min %02d s in all' $((SECONDS / 60)) $((SECONDS % 60))
if ((${#failed[@]})); then
    printf '; FAILED:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
printf '; all passed\n'
