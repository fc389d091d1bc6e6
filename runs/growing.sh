#!/usr/bin/env bash
# Adding findings to a trained model: 26 -> 40 -> 45 and 21 -> 26, against joint fits, and from few labels. Phantoms.
#
#   runs/growing.sh [OUT]      OUT defaults to outputs/growing
#   BACKBONE=...               a RUN folder or weights, in place of pretraining on these patients
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/growing}
PATIENTS=${PATIENTS:-2000}
BACKBONE=${BACKBONE:-$OUT/pretraining}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

hilum phantom "$OUT/phantoms" --layout cxrlt45 --patients "$PATIENTS" --size 192
hilum manifest "cxrlt=$OUT/phantoms" --out "$OUT/manifest.parquet"
hilum audit "$OUT/manifest.parquet"
hilum build "$OUT/manifest.parquet" --size 160 --encoding raw --out "$OUT/store"
[ "$BACKBONE" != "$OUT/pretraining" ] || hilum pretrain laptop_128 --data "$OUT/store" --out "$BACKBONE"
python runs/growing.py "$OUT/store" "$BACKBONE" "$OUT/models"
