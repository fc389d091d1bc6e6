#!/usr/bin/env bash
# What calibration and challenge scaling are worth: two small models, on synthetic patients and on real X-rays.
#
#   runs/calibration_gain.sh [OUT]      OUT defaults to outputs/calibration_gain; DATA to ../shared/data/nih-sample
#
# Heads on an untrained backbone, trained with cross-entropy and with the asymmetric loss, which inflates probabilities.
# Calibrators and cuts come from validation predictions of heads that have not seen validation.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/calibration_gain}
DATA=${DATA:-../shared/data/nih-sample}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

hilum phantom "$OUT/phantoms" --layout cxrlt --patients 2000 --size 128
hilum manifest "cxrlt=$OUT/phantoms" --out "$OUT/phantom.parquet"
hilum build "$OUT/phantom.parquet" --size 128 --encoding raw --out "$OUT/phantom"
hilum manifest "nih=$DATA" --split project --val-fraction 0.35 --test-fraction 0.35 --out "$OUT/nih.parquet"
hilum build "$OUT/nih.parquet" --size 128 --encoding raw --out "$OUT/nih"
gain() { # data, name, recipe, settings
  hilum fit "$3" --data "$OUT/$1" --backbone random:demo16 --out "$OUT/$1.$2" resolution=128 "${@:4}"
  hilum predict "$OUT/$1.$2" "$OUT/$1:test" --raw --out "$OUT/$1.$2.parquet"
  python runs/calibration_gain.py "$OUT/$1" "$OUT/$1.$2" "$OUT/$1.$2.parquet" "$OUT/$1.$2.json"
}
for data in phantom nih; do
  gain "$data" linear laptop_linear
  gain "$data" asymmetric laptop_linear loss=asymmetric
done
gain nih decoder laptop_decoder
