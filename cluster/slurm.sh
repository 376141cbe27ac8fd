#!/usr/bin/env bash
# Training under Slurm: starts one Ray node per machine for the duration of the job.
#
#   sbatch --nodes 2 cluster/slurm.sh --recipe sop_resnet50 --run-name sop --data.batch-size 80 \
#       --data.root /shared/sop_shards --storage /shared/nsl_dist
#
# Submit it from the root of the repository, on a file system shared by all machines, after `make setup`. Two minutes
# before its time limit the job writes a checkpoint and is requeued; --run-name is required for it to resume. The same
# happens before preemption if Slurm is configured to signal it (PreemptParameters=send_user_signal); otherwise the
# requeued job resumes from its last checkpoint.
#SBATCH --job-name=nsl_dist
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
PATH=$PWD/.venv/bin:$PATH
# A token for this job only, so that other users of these machines cannot access its Ray cluster.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export PATH RAY_AUTH_MODE RAY_AUTH_TOKEN
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=$(head --lines 1 <<< "$NODES") # this script runs here
ADDRESS=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
CPUS=${SLURM_CPUS_PER_TASK:-$(nproc)}
GPUS=${SLURM_GPUS_ON_NODE:-0}
export RAY_ADDRESS=$ADDRESS:$((20000 + SLURM_JOB_ID % 10000))
export SRUN_CPUS_PER_TASK=$CPUS # srun does not inherit it

srun --nodes 1 --ntasks 1 --nodelist "$HEAD" ray start --head --block --node-ip-address "$ADDRESS" \
  --port "${RAY_ADDRESS##*:}" --dashboard-host 127.0.0.1 --num-cpus "$CPUS" --num-gpus "$GPUS" &
HEAD_STEP=$!
until ray status > /dev/null 2>&1; do
  kill -0 $HEAD_STEP
  sleep 2
done
if ((SLURM_NNODES > 1)); then
  srun --nodes $((SLURM_NNODES - 1)) --ntasks $((SLURM_NNODES - 1)) --exclude "$HEAD" \
    ray start --block --address "$RAY_ADDRESS" --num-cpus "$CPUS" --num-gpus "$GPUS" &
fi

# One worker per GPU unless the arguments override it; training waits until all nodes have joined.
WORKERS=()
if ((GPUS > 0)); then WORKERS=(--num-workers $((SLURM_NNODES * GPUS))); fi
python jobs/train_sop.py "${WORKERS[@]}" "$@" &
TRAINING=$!
SIGNALLED=
trap 'SIGNALLED=1; kill -TERM $TRAINING' USR1
status=0
wait $TRAINING || status=$?
if [[ $SIGNALLED ]]; then # the signal ended the first wait; training is writing its checkpoint
  status=0
  wait $TRAINING || status=$?
fi
if [[ $SIGNALLED ]] && ((status == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
