#!/usr/bin/env bash
# This project's training step and PyTorch's on one GPU: recipes, precisions, checkpointing, batches.
#
#     bash benchmarks/gpu_matrix.sh export DIR    # with TensorFlow, anywhere: writes the steps
#     bash benchmarks/gpu_matrix.sh run DIR       # with JAX and PyTorch, on the GPU: measures them
#     bash benchmarks/gpu_matrix.sh table DIR     # tables of what has been measured so far
#
# What matters most comes first. Every run is a process of its own that takes ten minutes at most, and has
# a file in DIR: what is there is not done again, so the commands may be interrupted and repeated. Remove
# a file DIR/*.failed to try that run again. Variables choose less, or other programs:
#
#     RECIPES PRECISIONS REMATS   of those below
#     BATCHES                     own, one, half, quarter, and how often the recipe's own
#     KINDS                       jax, torch, and tensorflow: TensorFlow itself on the GPU: XLA on, for parts, off
#     TORCH_FLAGS                 variants of PyTorch, ";" between them
#     PYTHON JAX_PYTHON TORCH_PYTHON
#     FLAGS                       further flags of a recipe, for export and tensorflow
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command=${1:-} folder=${2:-}
RECIPES=${RECIPES:-cifar10 celeba64 celeba256}
PRECISIONS=${PRECISIONS:-mixed_bfloat16 mixed_float16 float32}
REMATS=${REMATS:-none cells}
BATCHES=${BATCHES:-own one 2 4 8 half quarter}
KINDS=${KINDS:-jax torch}
TORCH_FLAGS=${TORCH_FLAGS:---channels_last --compile;--channels_last --compile --cuda_graphs;--channels_last;--channels_last --cuda_graphs}
PYTHON=${PYTHON:-python} JAX_PYTHON=${JAX_PYTHON:-python} TORCH_PYTHON=${TORCH_PYTHON:-python}
STEPS=${STEPS:-20}
FLAGS=${FLAGS:-}
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

batch_size() { # of a recipe, and one of BATCHES
    local own
    own=$(sed -n 's/^batch_size: *\([0-9]*\).*/\1/p' "$here/../configs/$1.yaml")
    case $2 in
    own) echo "$own" ;;
    one) echo 1 ;;
    half) echo $(((own + 1) / 2)) ;;
    quarter) echo $(((own + 3) / 4)) ;;
    *) echo $((own * $2)) ;;
    esac
}

plan() { # lines of recipe, precision, checkpointing and one of BATCHES; those that matter most first
    for batch in $BATCHES; do
        for remat in $REMATS; do
            for precision in $PRECISIONS; do
                # Other batches than the recipe's own are for the first precision alone.
                [ "$batch" != own ] && [ "$precision" != "${PRECISIONS%% *}" ] && continue
                for recipe in $RECIPES; do echo "$recipe $precision $remat $batch"; done
            done
        done
    done
}

attempt() { # a name and a command: its last line becomes NAME.json, or its error NAME.failed
    local name=$1
    shift
    [ -e "$folder/$name.json" ] || [ -e "$folder/$name.failed" ] && return
    echo "$name" >&2
    if timeout --foreground -k 10 600 "$@" >"$folder/$name.out" 2>"$folder/$name.log"; then
        tail -1 "$folder/$name.out" >"$folder/$name.part" && mv "$folder/$name.part" "$folder/$name.json"
    else
        status=$?
        [ $status -eq 124 ] && echo "it takes more than ten minutes" >>"$folder/$name.log"
        [ $status -eq 130 ] && exit 130
        tail -1 "$folder/$name.log" >"$folder/$name.failed"
        tail -1 "$folder/$name.log" >&2
    fi
    rm -f "$folder/$name.out"
}

case $command in
export)
    mkdir -p "$folder"
    while read -r recipe precision remat batch; do
        size=$(batch_size "$recipe" "$batch")
        name=$recipe-$precision-$remat-$size
        # shellcheck disable=SC2086 # FLAGS are several words
        attempt "$name.export" "$PYTHON" "$here/xla_step.py" export --config "$recipe" \
            --precision "$precision" --gradient_checkpointing "$remat" --batch_size "$size" \
            $FLAGS "$folder/$name.step"
    done < <(plan)
    ;;
run)
    [ -d "$folder" ] || { echo "error: no folder '$folder'; first export to it" >&2; exit 2; }
    (nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo CPU) |
        head -1 >"$folder/device.txt"
    while read -r recipe precision remat batch; do
        size=$(batch_size "$recipe" "$batch")
        name=$recipe-$precision-$remat-$size
        for kind in $KINDS; do
            case $kind in
            jax)
                [ -e "$folder/$name.step" ] || continue
                profile=()
                [ "$batch" = own ] && [ "$remat" = none ] && profile=(--profile "$folder/$name.profile")
                attempt "$name.jax" "$JAX_PYTHON" "$here/xla_step.py" run "$folder/$name.step" \
                    --repeat "$STEPS" "${profile[@]}"
                ;;
            torch)
                number=0
                while IFS= read -r -d ';' flags; do
                    number=$((number + 1))
                    # shellcheck disable=SC2086 # several words
                    attempt "$name.torch$number" "$TORCH_PYTHON" "$here/torch_step.py" --config "$recipe" \
                        --precision "$precision" --gradient_checkpointing "$remat" \
                        --batch_size "$size" --steps "$STEPS" $flags
                done <<<"$TORCH_FLAGS;"
                ;;
            tensorflow)
                for jit in on parts off; do
                    # shellcheck disable=SC2086
                    attempt "$name.tensorflow-$jit" "$PYTHON" "$here/train_step.py" --config "$recipe" \
                        --precision "$precision" --gradient_checkpointing "$remat" \
                        --batch_size "$size" --steps "$STEPS" --jit_compile "$jit" $FLAGS
                done
                ;;
            esac
        done
    done < <(plan)
    ;;
table) exec "$PYTHON" "$here/matrix_table.py" "$folder" ;;
*)
    echo "usage: gpu_matrix.sh export|run|table DIR" >&2
    exit 2
    ;;
esac
