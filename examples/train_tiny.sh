#!/usr/bin/env bash
# The small preset from nothing: world, towers, feature cache, facts, captions, questions.
#
#     bash examples/train_tiny.sh [FOLDER]                 # default: runs/tiny; writes FOLDER/weights
#     PROCESSES=8 bash examples/train_tiny.sh              # one process per core; default: 2
#
# If it was stopped, start it again: it resumes, and what is done is not done again. One process per core, with
# one thread each, is about twice as fast as one process with several threads.
set -euo pipefail
out=${1:-runs/tiny}
export OMP_NUM_THREADS=1
run="torchrun --standalone --nproc_per_node=${PROCESSES:-2}"
recipe="--data data/toy --min-lr 1e-5 --clip 1 --dtype bfloat16 --workers 1 --resume"

# the toy world; the training clips are drawn when they are needed, and no video of them is written
[ -f data/toy/test.jsonl ] ||
    python -m apps.toy --out data/toy --n-train 32000 --n-test 400 --seed 0 --no-videos

[ "$(wc -l < data/toy/train.jsonl)" -eq 32000 ] ||
    { echo "error: data/toy is another world than the one this script makes; move it away" >&2; exit 2; }

# stage 0: the vision encoder and the language; then ViT and Q-Former are frozen, and their output is cached
$run -m apps.towers towers --preset tiny $recipe --out "$out/stage0" \
    --steps 3000 --batch-size 8 --lr 1.5e-3 --warmup 150 --eval-every 1000
python -m apps.towers features --weights "$out/stage0/last" --data data/toy --out "$out/features"

# the bridge: facts alone, then captions and questions beside the facts; with a weaker weight decay, it memorises
# its training clips
facts="$run -m apps.towers facts --train all --features $out/features $recipe --weight-decay 0.3"
$facts --weights "$out/stage0/last" --stage 1 --out "$out/facts" --facts-only --set dropout=0.1 \
    --steps 5000 --batch-size 64 --lr 3e-3 --warmup 100 --eval-every 1000
$facts --weights "$out/facts/last" --stage 1 --out "$out/facts2" --facts-only \
    --steps 3000 --batch-size 64 --lr 2.5e-3 --warmup 100 --eval-every 1000
$facts --weights "$out/facts2/last" --stage 1 --out "$out/stage1" --ask-facts 1 \
    --steps 500 --batch-size 32 --lr 1e-3 --warmup 50 --eval-every 250
$facts --weights "$out/stage1/last" --stage 2 --out "$out/stage2" --ask-facts 1 \
    --steps 650 --batch-size 32 --lr 1e-3 --warmup 50 --eval-every 325

# weights for sample.py: half the size, without dropout
[ "$out/weights" -nt "$out/stage2/last" ] ||
    python prepare.py merge --weights "$out/stage2/last" --out "$out/weights" --dtype float16 --set dropout=0
