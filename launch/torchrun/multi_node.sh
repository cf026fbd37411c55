#!/usr/bin/env bash
# Several machines without a scheduler: start the same command on each of them.
#
#   NODES=2 NODE_RANK=0 HEAD=ADDRESS launch/torchrun/multi_node.sh run STREAM.yaml [key=value...]   # on the first
#   NODES=2 NODE_RANK=1 HEAD=ADDRESS launch/torchrun/multi_node.sh run STREAM.yaml [key=value...]   # on the second
#
# Needs: cpt installed alike on all; the stream, its rows, output_dir and HF_HOME under one path on a file system that
# all see; port PORT of the first machine open to the others, and any port between them for what NCCL and gloo open.
#   NODES      machines                                      NODE_RANK  this one's number; 0 holds the rendezvous
#   HEAD       address of machine 0, as the others reach it  PORT       its port, 29500
#   PROCESSES  processes here: gpu (one per GPU) or a number GRACE      seconds for a checkpoint after SIGTERM, 600
#   TRIES      starts in all after a process or a machine was lost, 1
# DeepSpeed: add training.deepspeed=launch/deepspeed/zero3.json. The same number on all machines.
#
# Exit codes: 0 done; 75 stopped by SIGTERM or Ctrl-C, the same command goes on (torchrun alone says 1 for that); else
# torchrun's 1: what our own code was stands in its table. A supervisor that starts again on 75 is enough to resume:
#   systemd: RestartForceExitStatus=75
#
# Tested on one machine as two "machines" of one CPU process each (tests/distributed/test_launch_files.py): start,
# SIGTERM, going on. Not tested: two real machines, GPUs, NCCL.
set -euo pipefail

: "${NODES:?NODES is not set: the number of machines}"
: "${NODE_RANK:?NODE_RANK is not set: 0 on the first machine, 1 on the second, ...}"
: "${HEAD:?HEAD is not set: the address of machine 0, as the others reach it}"
if [[ $# -eq 0 ]]; then
  echo "usage: NODES=2 NODE_RANK=0 HEAD=ADDRESS $0 run STREAM.yaml [key=value...]" >&2
  exit 2
fi

# ---- settings that all machines share ------------------------------------------------------------------------------
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # fetch before (hf download MODEL); N processes must not fetch at once
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" # torchrun sets 1, which is slow where rows are tokenised
# HF_HOME: where models and rows lie, on the shared file system. DeepSpeed and Triton compile at first use, and N
# machines must not write one folder: leave TORCH_EXTENSIONS_DIR and TRITON_CACHE_DIR in a folder of each machine.
# Which network: NCCL and gloo (ours, for control) each choose an interface. If they choose one that does not reach the
# others, the start hangs until its time-out; then name it for both:
#   export NCCL_SOCKET_IFNAME=IFACE GLOO_SOCKET_IFNAME=IFACE     # `ip -br addr` lists them
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO says which network and which GPUs were found

# ---- start, pass SIGTERM on, say 75 ----------------------------------------------------------------------------------
signals=0 launcher=
trap 'signals=$((signals + 1)); [[ -z $launcher ]] || kill -TERM "$launcher" 2>/dev/null || true' TERM
trap 'signals=$((signals + 1))' INT # the terminal has sent it to the launcher too

for ((try = 1; try <= ${TRIES:-1} && !signals; try++)); do
  # Static: the machines are named, since a stage goes on with as many processes as it began with.
  torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "${PROCESSES:-gpu}" \
    --master_addr "$HEAD" --master_port "${PORT:-29500}" --shutdown-timeout "${GRACE:-600}" \
    -m cpt "$@" &
  launcher=$!
  while :; do # a signal ends `wait` before the launcher has ended
    seen=$signals code=0
    wait "$launcher" || code=$?
    if ((seen == signals)); then break; fi
  done
  if ((code == 0)); then exit 0; fi
done
if ((signals)); then exit 75; fi
exit "$code"
