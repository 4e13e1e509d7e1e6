#!/usr/bin/env bash
# The small preset from nothing: world, towers, cache, facts, captions, questions. Usage: bash examples/train_tiny.sh [FOLDER]
set -euo pipefail
out=${1:-runs/tiny}
python prepare.py toy --out data/toy --n-train 8000 --n-test 400 --seed 0
python train.py --preset tiny --stage 0 --data data/toy --out "$out/stage0" \
    --steps 3400 --batch-size 8 --lr 1.5e-3 --min-lr 1e-5 --warmup 150 --clip 1 --dtype bfloat16
python prepare.py features --weights "$out/stage0/last" --data data/toy --out "$out/features" --bfloat16
cached="--train all --data data/toy --features $out/features --min-lr 1e-5 --clip 1 --dtype bfloat16"
python train.py --weights "$out/stage0/last" --stage 1 $cached --out "$out/facts" \
    --facts-only --ask-facts 1 --steps 2000 --batch-size 64 --lr 3e-3 --warmup 100
python train.py --weights "$out/facts/last" --stage 1 $cached --out "$out/stage1" \
    --ask-facts 0.5 --steps 500 --batch-size 32 --lr 1e-3 --warmup 50
python train.py --weights "$out/stage1/last" --stage 2 $cached --out "$out/stage2" \
    --ask-facts 0.5 --steps 650 --batch-size 32 --lr 1e-3 --warmup 50
python prepare.py merge --weights "$out/stage2/last" --out "$out/weights" --dtype float16
