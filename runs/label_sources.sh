#!/usr/bin/env bash
# When do labels of other datasets help? On the synthetic patients of runs/ablation_store.sh; both seeds side by side.
#
#   runs/label_sources.sh [OUT]       OUT defaults to outputs/label_sources
#   STORE=...  BACKBONE=...           another store of cxrlt with others; a RUN folder or weights
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/label_sources}
STORE=${STORE:-outputs/ablation/store}
BACKBONE=${BACKBONE:-$OUT/pretraining}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

mkdir -p "$OUT"
[ -f "$STORE/store.json" ] || runs/ablation_store.sh "$(dirname "$STORE")"
if [ "$BACKBONE" = "$OUT/pretraining" ] && [ ! -f "$BACKBONE/teacher.safetensors" ]; then
  hilum pretrain laptop_128 --data "$STORE" --out "$BACKBONE" architecture=demo16 crops.global_size=96 \
    crops.local_size=48 steps=400 probe.every=0
fi
python runs/label_sources.py "$STORE" "$BACKBONE" "$OUT" --seeds 0 > "$OUT/seed0.log" 2>&1 &
FIRST=$!
python runs/label_sources.py "$STORE" "$BACKBONE" "$OUT" --seeds 1 > "$OUT/seed1.log" 2>&1
wait "$FIRST"
python runs/label_sources.py "$STORE" "$BACKBONE" "$OUT"
