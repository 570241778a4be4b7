#!/usr/bin/env bash
# bash scripts/slurm/check.sh [options of sbatch] FILE.sbatch [flags of launch.py]
#
# What `sbatch` with the same words would run into, without submitting anything: the request (by sbatch --test-only),
# GPUs against processes, Python, dataset, folders, flags and memory. The exit code is 2 where something is wrong.
# GPU_MEMORY_GIB=24 plans for such GPUs instead of 80 GiB.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

wrong=0
bad() { wrong=2 && printf 'wrong: %s\n' "$*"; }
ok() { printf 'ok: %s\n' "$*"; }
warn() { printf 'look: %s\n' "$*"; }

options=()
while (($#)) && [[ $1 != *.sbatch ]]; do options+=("$1") && shift; done
if (($# == 0)) || [[ ! -f $1 ]]; then
    printf 'wrong: %s is no .sbatch file. %s\n' "${1:-nothing}" \
        "Usage: bash scripts/slurm/check.sh [options of sbatch] FILE.sbatch [flags of launch.py]"
    exit 2
fi
file=$1 && shift
if ! command -v sbatch >/dev/null; then
    printf 'wrong: there is no sbatch here: run this on a node from which jobs are submitted\n'
    exit 2
fi

# The value of a long option of sbatch: typed, else in the file, else nothing
requested() {
    local found word previous=""
    found=$(sed -n "s/^#SBATCH --$1[= ]\([^ ]*\).*/\1/p" "$file" | tail -n 1)
    for word in ${options[@]+"${options[@]}"}; do
        [[ $previous == "--$1" ]] && found=$word
        [[ $word == "--$1="* ]] && found=${word#*=}
        previous=$word
    done
    printf '%s' "$found"
}

check_request() {
    local answer
    if answer=$(sbatch --test-only ${options[@]+"${options[@]}"} "$file" "$@" 2>&1); then
        ok "${answer#sbatch: }"
    else
        bad "SLURM refuses this request: $(tail -n 1 <<<"$answer"). Change the lines at the top of $file" \
            "(partition, account, time, nodes, GPUs, CPUs, memory); sinfo shows what there is"
    fi
    if [[ $(requested signal) != B:USR1@* ]]; then
        bad "without --signal=B:USR1@SECONDS the job is killed at its time limit instead of saving"
    fi
    if [[ $(requested ntasks-per-node)$(requested ntasks) ]]; then
        bad "--ntasks or --ntasks-per-node: leave them out. The job starts one launcher a node by itself, and with" \
            "them SLURM takes the fewest nodes of a range"
    fi
}

check_gpus() {
    gpus=$(requested gpus-per-node)
    gpus=${gpus:-$(requested gres)}
    gpus=$(grep -oE '[0-9]+$' <<<"${gpus##*:}")
    gpus=${gpus:-0}
    if ((gpus == 0)); then
        warn "no GPU is requested: ${PROCESSES_PER_NODE:-1} process(es) on each node's CPUs"
    elif ((${PROCESSES_PER_NODE:-$gpus} == gpus)); then
        ok "$gpus GPU(s) of each node, one process for each"
    else
        bad "$gpus GPU(s) of each node and PROCESSES_PER_NODE=$PROCESSES_PER_NODE: must be as many, or unset"
    fi
}

check_folders() {
    local output_dir dataset parent kind
    output_dir=$(flag_value output_dir "$@")
    dataset=$(flag_value dataset "$@")
    dataset=${dataset:-$(flag_value dataset_path "$@")}
    if [[ $dataset && ! -r $dataset ]]; then
        bad "--dataset $dataset cannot be read from $PWD"
    fi
    if [[ ! $output_dir ]]; then
        bad "no --output_dir among the flags: the job reads launch.py's exit code there"
        return
    fi
    parent=$output_dir
    while [[ ! -e $parent ]]; do parent=$(dirname "$parent"); done
    [[ -w $parent ]] || bad "--output_dir $output_dir: $parent cannot be written"
    kind=$(stat --file-system --format=%T "$parent")
    case $kind in
    tmpfs | ext2/ext3 | xfs | btrfs | overlayfs)
        [[ $nodes == 1 ]] || warn "--output_dir $output_dir is on $kind, as a disk of one machine is; all need the same"
        ;;
    *) ok "--output_dir $output_dir is on $kind" ;;
    esac
}

check_plan() {
    local python trainer answer
    if grep -qE '^(container|srun_options)=' "$file"; then
        warn "Python and flags are not checked: the job runs in a container"
        return
    fi
    eval "$(grep '^python=' "$file")"
    trainer=${TRAINER:-$PWD}
    if [[ ! -f $trainer/scripts/slurm/job.sh ]]; then
        bad "$trainer is not the repository's root: submit from there, or set TRAINER"
    elif ! command -v "$python" >/dev/null; then
        bad "there is no $python: bash scripts/setup.sh, or PYTHON=... sbatch ..."
    elif answer=$("$python" "$trainer/launch.py" "$@" --dry_run 1 --nodes "$nodes" \
        --gpus "${PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}" --gpu_memory_gib "${GPU_MEMORY_GIB:-80}" 2>&1); then
        ok "$(grep -E '^strategy|^expected' <<<"$answer" | paste -sd ';') (GPUs of ${GPU_MEMORY_GIB:-80} GiB)"
    else
        bad "launch.py refuses the flags: $(tail -n 1 <<<"$answer")"
    fi
}

nodes=$(requested nodes)
nodes=${nodes%%-*}
nodes=${nodes:-1}
check_request "$@"
check_gpus
check_folders "$@"
check_plan "$@"
exit "$wrong"
