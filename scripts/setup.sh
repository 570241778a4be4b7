#!/usr/bin/env bash
# bash scripts/setup.sh [EXTRA[,EXTRA...]]
#
# Make .venv in the repository root and install the trainer into it, with the tested versions of
# constraints.txt. Extras (test, notebook, tensorboard, audiocraft, bitsandbytes, ffmpeg, stems) add to those installed
# before. A second call with nothing changed returns at once. PYTHON=python3.12 chooses the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/installed-by-setup.txt # line 1: what was installed from; line 2: its extras, comma-separated
python=${PYTHON:-python3}

fail() {
    printf 'setup.sh: %s\n' "$*" >&2
    exit 1
}

# The names of all arguments, sorted and once each, comma-separated: "test,audiocraft" "test" -> "audiocraft,test"
union() {
    { printf '%s\n' "$@" | tr ', ' '\n\n' | grep -v '^$' || true; } | sort -u | paste -sd, -
}

wanted=$(union "$@")
for extra in ${wanted//,/ }; do
    case $extra in
    test | notebook | tensorboard | audiocraft | bitsandbytes | ffmpeg | stems) ;;
    *) fail "'$extra' is no extra of setup.cfg: use test, notebook, tensorboard, audiocraft, bitsandbytes, ffmpeg or stems, separated by commas" ;;
    esac
done

source_sum=$(cat setup.cfg pyproject.toml constraints.txt | cksum)
installed="" installed_sum=""
if [[ -f $stamp && -x $venv/bin/python ]]; then
    { read -r installed_sum && read -r installed; } <"$stamp" || true
fi
extras=$(union "$wanted" "$installed")
if [[ $installed_sum == "$source_sum" && $installed == "$extras" ]]; then
    exit 0
fi

if [[ ! -x $venv/bin/python ]]; then
    command -v "$python" >/dev/null || fail "there is no $python: install Python 3.10 or newer, or name one: PYTHON=/path/to/python3 bash scripts/setup.sh"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is $("$python" -V 2>&1), which is too old: Python 3.10 or newer is needed. Name another: PYTHON=python3.12 bash scripts/setup.sh"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"
    "$python" -m venv "$venv"
fi

rm -f "$stamp"
echo "Installing into $PWD/$venv: -e .${extras:+[$extras]} (the first time takes minutes) ..."
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}" ||
    fail "pip could not install the dependencies (its message is above)"
printf '%s\n%s\n' "$source_sum" "$extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Done. Activate with: source $venv/bin/activate"
