#!/bin/bash
# Fills the rows of RESULTS.md that take a GPU in one run of at most nine minutes; the seconds below add up to 540:
#
#     bash benchmarks/gpu_all.sh [FOLDER]
#
# writes a JSON file per row and all output (log.txt) into FOLDER, runs/bench-gpu if none is given. A part that takes
# longer than its share is stopped and said so; the others go on. PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.."
folder=${1:-runs/bench-gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
failed=0

row() { # row SECONDS NAME SCRIPT ARGUMENTS...
    local seconds=$1 name=$2 script=$3
    shift 3
    echo "== $name: $script $*"
    timeout --kill-after 10 "$seconds" "$python" "benchmarks/$script" --device cuda --json "$folder/$name.json" "$@" ||
        { echo "== $name: no result within $seconds s"; failed=1; }
}

{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    # Clips per second over the reference, utilisation, padding. Each precision beside the reference in TF32.
    row 100 train_step_bf16 train_step.py --size released --precision bf16 --micro_batch_size 32 --micro_batches 4 \
        --num_workers 8 --compile off on
    row 80 epoch train_step.py --size released --precision bf16 --micro_batch_size 32 --micro_batches 4 \
        --num_workers 8 --conditioning_group 8 --clips 13100 --repeats 1 --no_reference --epoch
    row 50 train_step_tf32 train_step.py --size released --precision no --micro_batch_size 16 --micro_batches 8 \
        --num_workers 8 --conditioning_group 8
    row 50 train_step_random train_step.py --size released --precision bf16 --micro_batch_size 32 --micro_batches 4 \
        --num_workers 8 --conditioning_group 1 --batching random --no_reference
    # Peak memory of configs/t4.yaml, 8gb.yaml (needs the 8bit extra, else it takes adamw and says so) and lora.yaml, with
    # clips of the greatest length and no more memory than such cards have to spare.
    row 85 small_cards small_cards.py --size released
    # Preparing: stages, and the whole.
    row 60 prepare prepare.py --size released --clips 1024 --batches 1 8 32
    # A dataset of LJSpeech's size: own memory of the host and padding.
    row 55 scaling scaling.py --clips 820 3275 13100
    # From recordings to the end of an epoch, demo size.
    row 60 end_to_end end_to_end.py --num_workers 8
} > >(tee "$folder/log.txt") 2>&1
exit $failed
