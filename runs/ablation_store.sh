#!/usr/bin/env bash
# The synthetic patients on which `hilum ablate` is run for docs/results.md: one dataset that is judged, two that only
# add labelled images. Sizes and seeds were fixed here before any comparison was run on them.
#
#   runs/ablation_store.sh [OUT]      OUT defaults to outputs/ablation
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/ablation}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

hilum phantom "$OUT/cxrlt" --layout cxrlt --patients 4800 --size 224 --seed 11 --minimum-patients 30
hilum phantom "$OUT/chexpert" --layout chexpert --patients 800 --size 224 --seed 12
hilum phantom "$OUT/nih" --layout nih --patients 800 --size 224 --seed 13
hilum manifest "cxrlt=$OUT/cxrlt" "chexpert=$OUT/chexpert" "nih=$OUT/nih" --findings cxrlt2024-task1 --split project \
  --val-fraction 0.12 --test-fraction 0.44 --out "$OUT/manifest.parquet"
hilum audit "$OUT/manifest.parquet"
hilum build "$OUT/manifest.parquet" --size 192 --encoding raw --out "$OUT/store"
