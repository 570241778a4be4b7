#!/usr/bin/env bash
# What srun runs once on each node of a job: launch.py in one process for each GPU. Started by job.sh.
set -euo pipefail
trap "" USR1 # the launcher would die of it; launch.py listens to it all the same

threads=$((SRUN_CPUS_PER_TASK / PROCESSES_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# The launcher kills its processes so many seconds after it was told to end them: a step and its save may need longer
# than its 30 s. SLURM's own KillWait stays what it is.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} # a log file needs no line a step
processes=$((SLURM_NNODES * PROCESSES_PER_NODE))
if ((processes == 1)); then
    exec "$PYTHON" "$TRAINER/launch.py" "$@"
fi
# SLURM_NODEID, as all of SLURM's numbers, is this task's own only here, inside the task.
exec "$PYTHON" -m accelerate.commands.launch --config_file "$TRAINER/accelerate_configs/multi_node.yaml" \
    --num_machines "$SLURM_NNODES" --num_processes "$processes" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    --log_dir "$RANK_LOGS/node-$SLURM_NODEID-$SLURMD_NODENAME" --tee 3 \
    "$TRAINER/launch.py" "$@"
