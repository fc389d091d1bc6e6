#!/usr/bin/env bash
# Does a pretrained backbone with a decoder beat the thumbnail floor on 780 real X-rays? Five splits by patient.
#
#   runs/nih_against_floor.sh [OUT]      OUT defaults to outputs/nih_against_floor; DATA to ../shared/data/nih-sample
#
# One backbone is pretrained on synthetic patients (PHANTOMS: the store of runs/ablation_store.sh), then goes on, in each
# split, on the training images of that split. The floor is fitted on train and val of the same split; it is a
# comparison, never a feature or a member. Everything here was fixed before it was run; but the recipe of pretraining was
# chosen before on train and val patients of split 0 (docs/log.md), most of whom are test patients of one of splits 1 to 4.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/nih_against_floor}
DATA=${DATA:-../shared/data/nih-sample}
PHANTOMS=${PHANTOMS:-outputs/ablation/store}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

hilum pretrain laptop_128 --data "$PHANTOMS" --out "$OUT/phantoms"
for split in 0 1 2 3 4; do
  part="$OUT/split_$split"
  [ -e "$part/model.parquet" ] && continue # a run that was stopped goes on with the split it was at
  rm -rf "$part"/{decoder,linear,model,store}
  hilum manifest "nih=$DATA" --split project --val-fraction 0.15 --test-fraction 0.2 --seed "$split" \
    --out "$part/manifest.parquet"
  hilum audit "$part/manifest.parquet"
  hilum build "$part/manifest.parquet" --size 256 --encoding raw --out "$part/store"
  hilum pretrain laptop_128 --data "$part/store" --init "$OUT/phantoms" --out "$part/pretraining" steps=400 \
    learning_rate=2e-3
  hilum fit laptop_decoder --data "$part/store" --backbone "$part/pretraining" --out "$part/decoder"
  hilum fit laptop_linear --data "$part/store" --backbone "$part/pretraining" --out "$part/linear"
  hilum combine "$part/decoder" "$part/linear" --out "$part/model"
  python runs/thumbnail_floor.py "$part/store" "$part/floor.parquet"
  for name in decoder model; do hilum predict "$part/$name" "$part/store:test" --out "$part/$name.parquet"; done
done
python runs/judge_splits.py "$OUT" floor decoder model
