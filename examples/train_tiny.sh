#!/usr/bin/env bash
# The small preset from nothing: world, towers, cache, facts, captions, questions. Usage: bash examples/train_tiny.sh [FOLDER]
# Started again, it goes on where it was stopped. One process a core with one thread each is about twice as fast as one
# process with two threads: PROCESSES=8 on 8 cores.
set -euo pipefail
out=${1:-runs/tiny}
export OMP_NUM_THREADS=1
train="torchrun --standalone --nproc_per_node=${PROCESSES:-2} train.py --data data/toy --min-lr 1e-5 --clip 1 --dtype bfloat16 --resume"
[ -f data/toy/test.jsonl ] || python prepare.py toy --out data/toy --n-train 24000 --n-test 400 --seed 0
$train --preset tiny --stage 0 --out "$out/stage0" --steps 3400 --batch-size 8 --lr 1.5e-3 --warmup 150 --workers 1
python prepare.py features --weights "$out/stage0/last" --data data/toy --out "$out/features" --bfloat16
cached="--train all --features $out/features --workers 1"
$train --weights "$out/stage0/last" --stage 1 $cached --out "$out/facts" --facts-only --ask-facts 1 \
    --set dropout=0.1 --steps 2000 --batch-size 64 --lr 3e-3 --warmup 100
$train --weights "$out/facts/last" --stage 1 $cached --out "$out/facts2" --facts-only --ask-facts 1 \
    --steps 2500 --batch-size 64 --lr 2.5e-3 --warmup 100
$train --weights "$out/facts2/last" --stage 1 $cached --out "$out/stage1" --ask-facts 0.5 \
    --steps 800 --batch-size 32 --lr 1e-3 --warmup 50
$train --weights "$out/stage1/last" --stage 2 $cached --out "$out/stage2" --ask-facts 0.5 \
    --steps 700 --batch-size 32 --lr 1e-3 --warmup 50
python prepare.py merge --weights "$out/stage2/last" --out "$out/weights" --dtype float16 --set dropout=0
