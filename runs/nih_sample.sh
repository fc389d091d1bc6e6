#!/usr/bin/env bash
# The real path: 780 chest X-rays of NIH ChestX-ray14, from their folder to a calibrated model and a report.
#
#   runs/nih_sample.sh [OUT]      OUT defaults to outputs/nih_sample; DATA to ../shared/data/nih-sample
#
# Pretraining sees training patients only. Everything is judged on patients that no stage has seen, beside two floors
# computed here on the same split: logistic regression on thumbnails, and heads on an untrained backbone.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/nih_sample}
DATA=${DATA:-../shared/data/nih-sample}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"
started=$SECONDS

hilum manifest "nih=$DATA" --split project --val-fraction 0.15 --test-fraction 0.2 --out "$OUT/manifest.parquet"
hilum audit "$OUT/manifest.parquet"
hilum build "$OUT/manifest.parquet" --size 256 --encoding raw --out "$OUT/store"

hilum pretrain laptop_128 --data "$OUT/store" --out "$OUT/pretraining"
hilum pretrain laptop_192 --data "$OUT/store" --init "$OUT/pretraining" --out "$OUT/pretraining_192"

hilum fit laptop_linear --data "$OUT/store" --backbone "$OUT/pretraining" --out "$OUT/model/members/linear_128"
hilum fit laptop_decoder --data "$OUT/store" --backbone "$OUT/pretraining" --out "$OUT/model/members/decoder_128"
hilum fit laptop_decoder --data "$OUT/store" --backbone "$OUT/pretraining_192" --out "$OUT/model/members/decoder_192"
hilum combine "$OUT"/model/members/* --out "$OUT/model"

# The floors, on the same split.
python runs/thumbnail_floor.py "$OUT/store" "$OUT/floor.parquet"
hilum fit laptop_linear --data "$OUT/store" --backbone random:demo16 resolution=128 --out "$OUT/random_linear"
hilum predict "$OUT/random_linear" "$OUT/store:test" --raw --out "$OUT/random.parquet"
hilum fit laptop_decoder --data "$OUT/store" --backbone random:demo16 resolution=128 --out "$OUT/random_decoder"
hilum predict "$OUT/random_decoder" "$OUT/store:test" --raw --out "$OUT/random_decoder.parquet"
hilum predict "$OUT/model/members/decoder_128" "$OUT/store:test" --raw --out "$OUT/decoder_128.parquet"

hilum predict "$OUT/model" "$OUT/store:test" --out "$OUT/test.parquet"
hilum evaluate "$OUT/floor.parquet" --labels "$OUT/store" --split test --min-positives 5 --out "$OUT/floor"
hilum evaluate "$OUT/decoder_128.parquet" --labels "$OUT/store" --split test --min-positives 5 \
  --compare "$OUT/random_decoder.parquet" --out "$OUT/pretraining_alone"
hilum evaluate "$OUT/test.parquet" --labels "$OUT/store" --split test --min-positives 5 \
  --compare "$OUT/random.parquet" --out "$OUT/against_random"
hilum evaluate "$OUT/test.parquet" --labels "$OUT/store" --split test --min-positives 5 \
  --compare "$OUT/floor.parquet" --explain "$OUT/model" --out "$OUT"
echo "Done in $(((SECONDS - started) / 60)) minutes: $OUT/report.html, $OUT/model"
