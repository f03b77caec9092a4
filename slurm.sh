#!/bin/bash
# A run under SLURM, of any length: it stops before the wall time, queues itself again and goes on.
#
#     sbatch slurm.sh train_block.py --out=out/run --data=...       (any script, any flags)
#
# Two minutes before the end SLURM sends USR1 to this shell. The ranks save and stop, scontrol puts
# the job back into the queue, and the next start goes on (--resume=1). A run that ends by
# itself, because it is done or because it failed, is not queued again.
#SBATCH --job-name=nanodlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

# source .venv/bin/activate    # whatever makes torchrun known

out='' run='' warned=''    # sbatch passes on the variables of the shell it was called from
for flag in "$@"; do case $flag in --out=*) out=${flag#--out=} ;; esac; done
if [ -z "$out" ]; then echo "usage: sbatch slurm.sh SCRIPT.py --out=FOLDER ..." >&2; exit 2; fi
# srun passes a signal on to torchrun, which must be told to care, and that to the ranks.
trap 'warned=1; if [ -n "$run" ]; then kill -USR1 "$run"; fi' USR1
trap : TERM    # cancelled or preempted: SLURM tells the ranks itself; wait until they have saved
# On several nodes, which must share the folders, --standalone becomes --nnodes="$SLURM_NNODES"
#   --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d
#   --rdzv_endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun torchrun --standalone --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 "$@" --resume=1 &
run=$!
# A trap interrupts the wait, so wait again; but once warned no longer than SLURM does.
while [ -z "$warned" ] && kill -0 "$run" 2>/dev/null; do wait "$run"; status=$?; done
if [ -z "$warned" ]; then exit "$status"; fi
for _ in {1..90}; do kill -0 "$run" 2>/dev/null || break; sleep 1; done
if tail -n 2 "$out/log.txt" | grep -q '^done:'; then exit 0; fi
scontrol requeue "$SLURM_JOB_ID"
