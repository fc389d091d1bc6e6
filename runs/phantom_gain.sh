#!/usr/bin/env bash
# Does pretraining help? The same linear probe on a pretrained and on an untrained backbone, phantoms, same patients.
#
#   runs/phantom_gain.sh [OUT]      OUT defaults to outputs/phantom_gain
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/phantom_gain}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

hilum phantom "$OUT/phantoms" --layout cxrlt --patients 2000 --size 192
hilum manifest "cxrlt=$OUT/phantoms" --out "$OUT/manifest.parquet"
hilum audit "$OUT/manifest.parquet"
hilum build "$OUT/manifest.parquet" --size 160 --encoding raw --out "$OUT/store"
hilum pretrain laptop_128 --data "$OUT/store" --out "$OUT/pretraining"
for backbone in "$OUT/pretraining" random:demo16; do
  name=$(basename "${backbone%%:*}")
  hilum fit laptop_linear --data "$OUT/store" --backbone "$backbone" --out "$OUT/$name.model" resolution=128
  hilum predict "$OUT/$name.model" "$OUT/store:test" --raw --out "$OUT/$name.parquet"
done
hilum evaluate "$OUT/pretraining.parquet" --labels "$OUT/store" --split test --min-positives 10 \
  --compare "$OUT/random.parquet" --out "$OUT"
