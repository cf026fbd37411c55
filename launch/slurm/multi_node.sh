#!/usr/bin/env bash
# Several machines of a SLURM cluster, all their GPUs, started again by themselves until the stream is finished.
#
#   sbatch --nodes=2 launch/slurm/multi_node.sh run STREAM.yaml [key=value...]
#
# Needs: cpt in the environment that sbatch is called from (SLURM passes it on) on a file system that all machines see,
# and there too, under one path, the stream, its rows, output_dir and HF_HOME. Ask for GPUs as your cluster names them:
# --gres=gpu:8 where --gpus-per-node is not known. Options given to sbatch stand over those here.
#   PROCESSES  on each machine: gpu (one per GPU, the default) or a number
#   GRACE      seconds for a checkpoint after SIGTERM, 540      REQUEUES  how often the job may be put back, 100
#   PORT       of the rendezvous; default: from the job's number, so that two jobs on a machine do not meet
# DeepSpeed: add training.deepspeed=launch/deepspeed/zero3.json. Say processes=16 to be refused any other number: a
# stage goes on with as many processes as it began with.
#
# Ten minutes before the time limit (and on preemption, where the cluster has PreemptParameters=send_user_signal) SLURM
# sends SIGTERM to this script; srun passes it
# on, every process writes a checkpoint, and the job goes back into the queue with the same command, which goes on from
# there. A run that ends with an error of its own is not put back. A machine that is lost: SLURM puts the job back
# itself (--requeue).
#
# Tested without SLURM: two "machines" of one CPU process each, SIGTERM, with stand-ins for srun and scontrol
# (tests/distributed/test_launch_files.py). Not tested: SLURM itself, two real machines, GPUs, NCCL.
#SBATCH --job-name=cpt
#SBATCH --nodes=2
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
  echo "usage: sbatch --nodes=N $0 run STREAM.yaml [key=value...]" >&2
  exit 2
fi

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # compute nodes often have no network; fetch before: hf download MODEL
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO says which network and which GPUs were found
# DeepSpeed and Triton compile at first use; machines must not write one folder at the same time:
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-/var/tmp/$(id -un)-torch_extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/var/tmp/$(id -un)-triton}"
# NCCL and gloo (ours, for control) each choose a network interface. If the start hangs, name one that joins the
# machines, for both (`ip -br addr` lists them): export NCCL_SOCKET_IFNAME=IFACE GLOO_SOCKET_IFNAME=IFACE

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# One torchrun per machine; its number there is known only there, so a shell on each writes the command.
# The machines end together by themselves; killed on the first one's exit, another might lose its last checkpoint.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 bash -c '
  exec torchrun --nnodes "$1" --node_rank "$SLURM_NODEID" --nproc_per_node "$2" --master_addr "$3" --master_port "$4" \
    --shutdown-timeout "$5" -m cpt "${@:6}"
' torchrun "$SLURM_JOB_NUM_NODES" "${PROCESSES:-gpu}" "$head_node" "$port" "${GRACE:-540}" "$@" &
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
