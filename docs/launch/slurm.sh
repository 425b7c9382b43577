#!/usr/bin/env bash
# Train on two hosts with four GPUs each under Slurm: `sbatch docs/launch/slurm.sh CONFIG RUN_DIRECTORY [OPTION ...]`
#
# One task per GPU. Two minutes before the time limit, Slurm sends SIGUSR1 to every task: the run ends with a checkpoint and exit
# code 75, the job is requeued, and the same command resumes the run. If a node fails, Slurm requeues the job too. The run
# directory must be on a file system that all hosts share.
#SBATCH --job-name=msf-faiss
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG RUN_DIRECTORY [OPTION ...]}
run=${2:?usage: sbatch slurm.sh CONFIG RUN_DIRECTORY [OPTION ...]}
shift 2

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
trap '' USR1 # the tasks handle it, not this script

# shellcheck disable=SC2016 # each task expands its own variables
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec msf-faiss pretrain "$@"' pretrain "$config" --out "$run" "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
