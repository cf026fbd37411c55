#!/usr/bin/env bash
# One machine of a SLURM cluster, all its GPUs, started again by itself until the stream is finished.
#
#   sbatch launch/slurm/one_node.sh run STREAM.yaml [key=value...]
#
# Needs: cpt in the environment that sbatch is called from (SLURM passes it on), or a line below that activates it;
# output_dir on a disk that the job finds again. Ask for GPUs as your cluster names them: --gres=gpu:8 where
# --gpus-per-node is not known. Options given to sbatch stand over those here.
#   PROCESSES  gpu (one per GPU, the default) or a number    GRACE  seconds for a checkpoint after SIGTERM, 540
#   REQUEUES   how often the job may be put back, 100
# DeepSpeed: add training.deepspeed=launch/deepspeed/zero2.json.
#
# Ten minutes before the time limit (and on preemption, where the cluster has PreemptParameters=send_user_signal) SLURM
# sends SIGTERM to this script; every process
# writes a checkpoint, and the job goes back into the queue with the same command, which goes on from there. A run that
# ends with an error of its own is not put back. A machine that is lost: SLURM puts the job back itself (--requeue).
#
# Tested without SLURM: on a CPU with PROCESSES=2, SIGTERM, and a stand-in for scontrol
# (tests/distributed/test_launch_files.py). Not tested: SLURM itself, GPUs, NCCL.
#SBATCH --job-name=cpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
#SBATCH --output=%x-%j.out
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: sbatch $0 run STREAM.yaml [key=value...]" >&2
  exit 2
fi

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # compute nodes often have no network; fetch before: hf download MODEL
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO says which GPUs and links were found
# HF_HOME, TORCH_EXTENSIONS_DIR (DeepSpeed's extensions) and TRITON_CACHE_DIR lie in your home unless you set them.

torchrun --standalone --nproc_per_node "${PROCESSES:-gpu}" --shutdown-timeout "${GRACE:-540}" -m cpt "$@" &
launcher=$! signals=0
trap 'signals=$((signals + 1)); kill -TERM "$launcher" 2>/dev/null || true' TERM

while :; do # a signal ends `wait` before the launcher has ended
  seen=$signals code=0
  wait "$launcher" || code=$?
  if ((seen == signals)); then break; fi
done
if ((code != 0 && signals && ${SLURM_RESTART_COUNT:-0} < ${REQUEUES:-100})); then
  echo "stopped with a checkpoint; the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
