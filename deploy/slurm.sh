#!/bin/bash
# The recordings of a folder, in as many parts as the array has tasks, each with a journal of its own:
#   ark-asr models pull 0.6b && ark-asr export 0.6b     # once, where there is a network
#   sbatch --array=1-16 deploy/slurm.sh RECORDINGS TEXTS --model 0.6b
# Both folders are on a file system that all nodes share. The same line again goes on with what is not done; another
# number of tasks would begin anew. A task fails when one of its files did: the journal says which, and why.
#SBATCH --job-name=ark-asr
#SBATCH --array=1-16
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --requeue
#SBATCH --output=ark-asr-%A_%a.log
set -euo pipefail
step=${SLURM_ARRAY_TASK_STEP:-1}
if ((SLURM_ARRAY_TASK_MIN + step * (SLURM_ARRAY_TASK_COUNT - 1) != SLURM_ARRAY_TASK_MAX)); then
    echo "slurm.sh: the array has gaps; give a range, as --array=1-16" >&2
    exit 1
fi
part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / step + 1))
exec srun ark-asr transcribe "$1" --recursive --offline --output-dir "$2" --resume \
    --shard "$part/$SLURM_ARRAY_TASK_COUNT" "${@:3}"
