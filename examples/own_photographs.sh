#!/usr/bin/env bash
# From a folder of your own photographs to a web page, in five commands.
#
#   bash examples/own_photographs.sh PHOTOS OUT [any flag of train_keras.py]
#
# PHOTOS is a folder of images, at any depth. The more the better: some thousands at least. Their size is found: the
# largest up to 256x256 that nearly all of them reach, for which the recipe celeba64 needs up to 16 times the memory that
# it needs for 64x64. To train on one GPU say SIZE=64 before the line, or end it with
# "--config celeba256 --gradient_checkpointing cells", which takes the place of celeba64.
set -euo pipefail
photos=$1 out=$2
shift 2

# 1. Crop, scale and pack them once; what is too small or unreadable is skipped and listed.
nvae-prepare images --input "$photos" --output "$out/tfrecords" ${SIZE:+--size "$SIZE"}
# 2. See what training will see.
nvae-inspect --dataset tfrecords --data "$out/tfrecords" --output "$out/inspect.png"
# 3. Train (a GPU-day or more for good samples). The same command with --cont_training continues.
python train_keras.py --config celeba64 --dataset tfrecords --data "$out/tfrecords" --root "$out" --save run "$@"
# 4. How good is it?
python evaluate_keras.py --checkpoint "$out/run" --eval_mode evaluate --num_iw_samples 10
# 5. One page with samples, reconstructions, what each latent group does, and curves.
nvae-gallery "$out/run"
