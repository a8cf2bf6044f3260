#!/usr/bin/env bash
# Trains the two small models that a release carries, and measures and packs them, with cards.
#
#   bash examples/release_models.sh OUT [FLAG...]
#
# Flags are those of nvae-train, for both models. docs/made.json says how long "digits" and "photos" take. OUT
# gets nvae-tf-NAME.tar.gz, a run's folder (nvae_tf.load reads it); nvae-tf-NAME.md and nvae-tf-NAME.png, its
# model card and that card's picture; and nvae-tf-NAME.html, its gallery. Where it stopped, it continues.
set -euo pipefail
out=$1
shift
mkdir -p "$out"
for name in digits photos; do
    run=$out/runs/$name
    begun=()  # an empty array is no error below, as it is in bash before 4.4
    [ -e "$run/config.yaml" ] && begun=(--cont_training)
    nvae-train --config "$name" --root "$out/runs" "$@" ${begun[@]+"${begun[@]}"}
    nvae-evaluate --checkpoint "$run" --eval_mode evaluate --num_iw_samples 10
    nvae-evaluate --checkpoint "$run" --eval_mode card
    nvae-gallery "$run"
    sed "s/(model_card\.png)/(nvae-tf-$name.png)/" "$run/MODEL_CARD.md" > "$out/nvae-tf-$name.md"
    cp "$run/model_card.png" "$out/nvae-tf-$name.png"
    cp "$run/gallery.html" "$out/nvae-tf-$name.html"
    # The newest checkpoint alone: that is the trained model.
    newest=$(cd "$run/checkpoints" && ls -d step-* | sort -t- -k2 -n | tail -1)
    tar -C "$out/runs" -czf "$out/nvae-tf-$name.tar.gz" --exclude logs \
        $(cd "$out/runs" && find "$name" -maxdepth 1 -type f) "$name/checkpoints/$newest"
    echo "written: $out/nvae-tf-$name.tar.gz and, beside it, .md, .png and .html"
done
