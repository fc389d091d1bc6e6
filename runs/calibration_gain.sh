#!/usr/bin/env bash
# What calibration and challenge scaling are worth: two small models, on synthetic patients and on real X-rays.
#
#   runs/calibration_gain.sh [OUT]      OUT defaults to outputs/calibration_gain; DATA to ../shared/data/nih-sample
#
# Heads on an untrained backbone: cheap, and poorly calibrated enough to have something to gain. Calibrators and cuts
# come from validation predictions of heads that have not seen validation; test is judged once.
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
for data in phantom nih; do
  for head in linear decoder; do
    hilum fit "laptop_$head" --data "$OUT/$data" --backbone random:demo16 --out "$OUT/$data.$head" resolution=128
    hilum predict "$OUT/$data.$head" "$OUT/$data:test" --raw --out "$OUT/$data.$head.parquet"
    python runs/calibration_gain.py "$OUT/$data" "$OUT/$data.$head" "$OUT/$data.$head.parquet" \
      "$OUT/$data.$head.json"
  done
done
