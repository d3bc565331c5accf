#!/usr/bin/env bash
# One verb of lora-recycle on all GPUs of all nodes of a SLURM job:
#
#     sbatch --nodes 2 --gpus-per-node 4 examples/slurm.sh invert pool --output shared/surrogate
#
# Pool and output must lie in a folder that all nodes see. Set MIXED_PRECISION=bf16 for bfloat16.
#SBATCH --job-name=lora-recycle
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
set -euo pipefail

# one task a node starts accelerate, which starts a process for each GPU
gpus=${SLURM_GPUS_ON_NODE:?request GPUs, as in --gpus-per-node 4}
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
main=${main%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))

export MAIN="$main" PORT="$port" GPUS="$gpus" PROCESSES=$((SLURM_NNODES * gpus))
several=--multi_gpu
[ "$PROCESSES" -gt 1 ] || several=
export SEVERAL="$several"

# shellcheck disable=SC2016  # SLURM_NODEID is another one on each node
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch $SEVERAL \
    --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN" --main_process_port "$PORT" \
    --mixed_precision "${MIXED_PRECISION:-no}" --dynamo_backend no \
    -m lora_recycle "$@"' lora-recycle "$@"
