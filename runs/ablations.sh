#!/usr/bin/env bash
# The tables of docs/results.md on classification: the slides' 13 rows, losses, studies and added labels, 5 seeds each, on
# synthetic patients. Everything was fixed here before it was run; each table goes on where it was when it is stopped.
#
#   runs/ablation_store.sh && runs/ablations.sh [OUT]      OUT defaults to outputs/ablation
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/ablation}
make --quiet setup
PATH="$PWD/.venv/bin:$PATH"

common=(--scale laptop --data "$OUT/store" --target cxrlt --workers 2 "seeds=[0,1,2,3,4]" minimum_positives=20)
hilum ablate slides --out "$OUT/slides" "${common[@]}"
backbone=$(echo "$OUT"/slides/backbones/vitl_336/once-*/run)
for plan in study losses labels; do
  hilum ablate "$plan" --out "$OUT/$plan" --backbone "vitl_336=$backbone" "${common[@]}"
done
