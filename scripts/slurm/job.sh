# Sourced by the .sbatch files beside it, inside a job, in the folder where the job was submitted.
#
#   train [flags of launch.py]  one process for each GPU of the job; sets `code` to what launch.py ended with
#   end_of_job                  ends a job that requeues itself under the same id as long as it can go on
#   end_of_link                 ends one of several jobs that follow each other
#
# From the .sbatch file: `python` and, where they are set, the arrays `container` and `srun_options`. From the
# environment: PROCESSES_PER_NODE instead of the number of GPUs (for CPUs); MAX_STARTS (200) of one job.
trainer=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
starts=$((${SLURM_RESTART_COUNT:-0} + 1))
code=1
asked=""     # by USR1, to save and wait in the queue again: the time limit is near
cancelled="" # by TERM to this shell: SLURM ends the job, and requeues it by itself where it wants to

say() { printf 'job.sh: %s\n' "$*" >&2; }

refuse() {
    say "error: $*"
    exit 2 # launch.py's code for flags and launches that cannot work
}

train() {
    output_dir=$(flag_value output_dir "$@")
    [[ $output_dir ]] || refuse "no --output_dir among the flags, where launch.py leaves its exit code: add one"
    [[ ${container[*]-}${srun_options[*]-} ]] || command -v "$python" >/dev/null ||
        refuse "there is no $python in $PWD: bash scripts/setup.sh, and submit from there, or PYTHON=... sbatch ..."
    prepare
    say "job $SLURM_JOB_ID, start $starts: $SLURM_JOB_NUM_NODES x $PROCESSES_PER_NODE process(es) on" \
        "$SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT. Below, each line begins with its node's number;" \
        "the output of each of several processes is in $RANK_LOGS"

    # --kill-on-bad-exit=0: where one process fails, the others hear why and end by themselves.
    srun --label --kill-on-bad-exit=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        ${srun_options[@]+"${srun_options[@]}"} ${container[@]+"${container[@]}"} \
        bash "$trainer/scripts/slurm/task.sh" "$@" &
    local step=$! status=0
    trap 'asked=yes; say "USR1: saving"; ask "$step"' USR1
    trap 'cancelled=yes; say "TERM: ended from outside"' TERM
    while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait` early
        wait "$step"
        status=$?
    done
    trap '' USR1
    code=$(verdict "$status")
    say "launch.py ended with $code (srun with $status)"
}

# flag_value NAME [flags]: the value of launch.py's flag, the last where there are several, else nothing
flag_value() {
    local name=$1 found="" previous="" word
    shift
    for word in "$@"; do
        [[ ${previous//-/_} == "__$name" ]] && found=$word
        previous=${word%%=*}
        [[ $word == --*=* && ${previous//-/_} == "__$name" ]] && found=${word#*=}
        previous=$word
    done
    printf '%s' "$found"
}

prepare() {
    local gpus=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export PROCESSES_PER_NODE=$((gpus > 0 ? gpus : 1)) PYTHON=$python TRAINER=$trainer
    export RANK_LOGS=$output_dir/logs/$SLURM_JOB_ID/start-$starts
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not meet
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not take the job's
    mkdir -p "$RANK_LOGS" && touch "$RANK_LOGS/started" || exit 4 # launch.py's code where nothing can be written
    # A former run's; not where another job runs, which may be about to leave its own.
    [[ $(job_in_it) == "" ]] && rm -f "$output_dir/exit_code"
}

newest_checkpoint() {
    find "$output_dir/checkpoints" -regextype posix-extended -regex '.*/step-[0-9]{8,}/checkpoint\.json' 2>/dev/null |
        sort | tail -n 1
}

# The id of the other job that runs in output_dir or was killed there, as launch.py's lock names it
job_in_it() {
    sed -n 's/^ *"job": "\([^"]*\)".*/\1/p' "$output_dir/.holder.json" 2>/dev/null | grep -vx "$SLURM_JOB_ID"
}

# USR1 to all processes, and again every 30 s: one that is only starting does not hear it yet.
ask() {
    (while kill -USR1 "$1" 2>/dev/null; do sleep 30; done) &
}

# launch.py's own code, which its launchers make 1; where it could not leave one, what is known without it
verdict() {
    if [[ $(job_in_it) ]]; then
        say "job $(job_in_it) runs in $output_dir"
        echo 2
    elif [[ -s $output_dir/exit_code ]]; then
        cat "$output_dir/exit_code"
    elif [[ $asked ]]; then
        echo 75
    else
        echo "$1"
    fi
}

# Saved on request; or processes were lost in the middle of training, as when a machine fails. What fails for the
# third time at one checkpoint is no accident.
can_go_on() {
    ((code == 75)) && return
    ((code == 0 || code == 2)) && return 1
    [[ $code == 1 || ! -s $output_dir/exit_code ]] || return 1
    [[ $output_dir/metrics.jsonl -nt $RANK_LOGS/started ]] || return 1
    local losses=$output_dir/logs/lost_at.txt here
    here=$(newest_checkpoint)
    printf '%s\n' "${here:-no checkpoint}" >>"$losses"
    (($(grep -cxF "${here:-no checkpoint}" "$losses") < 3))
}

end_of_job() {
    if [[ $cancelled ]] || ! can_go_on; then
        exit "$code"
    fi
    # An array's last task has the array's own id: naming that would requeue all of them.
    trap '' TERM # which the requeue itself sends
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    if ((starts >= ${MAX_STARTS:-200})); then
        say "not requeued: job $job has started $starts times; MAX_STARTS=... sbatch ... allows more"
    elif scontrol requeue "$job"; then
        say "requeued as job $job"
        exit 0
    fi
    say "submit the same job again: it goes on where this one was"
    exit "$code"
}

end_of_link() {
    local waiting=(--name="$SLURM_JOB_NAME" --user="$(id -un)" --states=PENDING)
    if [[ $cancelled ]]; then
        exit "$code"
    elif ! can_go_on; then
        ((code == 0)) || say "the jobs behind this one would end the same way: cancelled"
        scancel --name="$SLURM_JOB_NAME" --user="$(id -un)" --state=PENDING
        exit "$code"
    elif [[ $(squeue --noheader "${waiting[@]}") ]]; then
        say "the next job of the chain goes on"
        exit 0
    fi
    say "no job of the chain is left: submit more, the first goes on where this one was"
    exit "$code"
}
