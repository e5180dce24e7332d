#!/usr/bin/env bash
# Runs a config on GPUs by Slurm, a process for every GPU, and again after a preemption.
#
#   sbatch --nodes=2 tools/launch/slurm_gpus.sh configs/NAME.py [--config.KEY=VALUE ...]
#
# from the root of this repository, in a directory that all nodes share.
#SBATCH --job-name=sdprune_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end: time for a step and its checkpoint.
#SBATCH --signal=TERM@120
set -uo pipefail
config=${1:?say sbatch tools/launch/slurm_gpus.sh configs/NAME.py}
shift
srun --kill-on-bad-exit=1 .venv/bin/python -m sdprune_jax.main \
  --config="$config" --config.mesh.coordinator=auto "$@"
status=$?
if (( status == 143 )); then scontrol requeue "$SLURM_JOB_ID"; fi  # it was saved: go on later
exit "$status"
