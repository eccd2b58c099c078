#!/usr/bin/env bash
# All benchmarks on one GPU, within ten minutes: what a run costs, how fast the result is, what a merge costs, and whether
# compaction costs quality. Needs an environment with pat and its dependencies, or wheels of what is missing:
#
#   WHEELS=wheels MODEL=models/smollm2 DATA=instruct.jsonl OUT=benchmarks/results/gpu bash benchmarks/gpu.sh
#
# WHEELS  folder of wheels, installed into a folder of their own without an index; none if everything is there
# MODEL   a base model for the comparison of qualities, DATA its instruction data; without them it is left out
# Every part has a time limit of its own, so that one that hangs leaves the others their figures.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$site:$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" -c 'import pat, torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())' || exit 1

failed=0
part() {  # part SECONDS NAME COMMAND...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "== $name ended with status $status"; failed=1; }
}

part 200 train_cost "$PYTHON" benchmarks/train_cost.py --hidden_size 4096 --layers 4 --batch_size 8 --steps 200 \
    --repetitions 2 --output "$OUT/train_cost.json"
part 150 inference_speed "$PYTHON" benchmarks/inference_speed.py --device cuda --dtype bfloat16 --hidden_size 4096 \
    --decode_hidden_size 4096 --repetitions 7 --output "$OUT/inference_speed.json"
part 120 merge_cost "$PYTHON" benchmarks/merge_cost.py --device cuda --shape 7b --parts merges \
    --merges none,pca --repetitions 1 --output "$OUT/merge_cost.json"
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ]; then
    part 120 compaction_nll "$PYTHON" benchmarks/compaction_nll.py --model "$MODEL" --data "$DATA" --seeds 0,1,2 \
        --steps 120 --output "$OUT/compaction_nll.json"
fi
ls -l "$OUT"
exit $failed
