#!/usr/bin/env bash
# What screening flags: real X-rays (NIH sample) and synthetic ones (phantoms), each fitted on its own training split.
#
#   runs/screening.sh [OUT]      OUT defaults to outputs/screening; DATA to ../shared/data/nih-sample
#
# Everything is judged on patients that the fit has not seen. Under 5 minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/screening}
DATA=${DATA:-../shared/data/nih-sample}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

hilum manifest "nih=$DATA" --split project --val-fraction 0.15 --test-fraction 0.2 --seed 11 \
  --out "$OUT/nih/manifest.parquet"
hilum build "$OUT/nih/manifest.parquet" --size 256 --encoding raw --workers 1 --out "$OUT/nih/store"
python runs/screening.py "$OUT/nih/store" "$OUT/nih/result.json"

hilum phantom "$OUT/phantoms/source" --layout cxrlt --patients 300 --size 256 --workers 1 --seed 0
hilum manifest "cxrlt=$OUT/phantoms/source" --out "$OUT/phantoms/manifest.parquet"
hilum build "$OUT/phantoms/manifest.parquet" --size 256 --encoding raw --workers 1 --out "$OUT/phantoms/store"
python runs/screening.py "$OUT/phantoms/store" "$OUT/phantoms/result.json"
