#!/usr/bin/env bash
# Training steps of the recipes at their own batch sizes, in every precision, compiled and not, as a
# Markdown table. Every run is a separate process; one that fails (out of memory, say) has a row, too.
#
#     bash benchmarks/gpu_matrix.sh > table.md
#
# All arguments go to every run; RECIPES, PRECISIONS and JIT choose fewer. A try-out on a CPU:
#
#     RECIPES=digits JIT=off bash benchmarks/gpu_matrix.sh --steps 1 --num_channels_enc 4 --num_channels_dec 4
set -uo pipefail
here=$(dirname "$0")
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
echo "Device: ${device:-CPU}"
echo
echo "| recipe | precision | XLA | batch | images/s | peak GiB | trace + first step, s |"
echo "| --- | --- | --- | --- | --- | --- | --- |"
for recipe in ${RECIPES:-mnist cifar10 celeba64 celeba256}; do
    for precision in ${PRECISIONS:-float32 mixed_float16 mixed_bfloat16}; do
        for jit in ${JIT:-on off}; do
            echo "$recipe $precision $jit" >&2
            log=$(mktemp)
            python "$here/train_step.py" --config "$recipe" --precision "$precision" \
                --jit_compile "$jit" "$@" 2>"$log" | tail -1 | python -c '
import json, sys
row = sys.argv[1:]
try:
    result = json.loads(sys.stdin.readline())
    first = result["trace_seconds"] + result["first_step_seconds"]
    row += [str(result["batch_size"]), "%.1f" % result["images_per_second"]]
    row += ["%.1f" % result["peak_memory_gib"], "%.0f" % first]
except ValueError:
    row += ["failed", "", "", ""]
print("| " + " | ".join(row) + " |")
' "$recipe" "$precision" "$jit"
            tail -1 "$log" >&2
            rm -f "$log"
        done
    done
done
