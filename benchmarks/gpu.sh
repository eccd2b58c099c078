#!/usr/bin/env bash
# All benchmarks on one GPU: what a run costs, how fast the result is, what a merge costs, whether compaction costs
# quality, and how methods compare after a million tokens (each of PAT's cells has its parity figures in bf16 beside
# it). On an H100 all but the last take about eleven minutes; PARTS splits them where that is too long for one run. Needs an
# environment with pat and its dependencies, or wheels of what is missing:
#
#   WHEELS=wheels MODEL=models/smollm2 DATA=instruct.jsonl OUT=benchmarks/results/gpu bash benchmarks/gpu.sh
#
# WHEELS   folder of wheels, pat's own among them, installed into a folder of their own without an index; none if
#          everything is there
# MODEL    a base model for the comparisons of qualities, DATA its instruction data; without them these are left out
# SCRATCH  folder for 30 GB on the disk that copies and merges are to be timed on; the other parts use TMPDIR (25 GB)
# PARTS    what to do: nll memory train inference merge, which is the default, and compare, whose seven trainings want a
#          card of 100 GB: on one of 80 GB set COMPARE="--workers 5"
# TASKS    folder of the questions that the comparison's models are asked; without it they are asked none
# COMPARE  further flags of the comparison, such as "--steps 100"
# REHEARSE 1 to try every part without a GPU, in tiny shapes and with a small MODEL, so that no mistake costs its minutes
# Every part has a time limit of its own, so that one that hangs leaves the others their figures.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-nll memory train inference merge}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH="benchmarks${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
[ -n "${REHEARSE:-}" ] ||
    "$PYTHON" -c 'import pat, torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())' || exit 1

part() {  # part SECONDS NAME COMMAND...; nothing if it is not asked for
    local limit=$1 name=$2 started=$SECONDS
    shift 2
    [ -z "${REHEARSE:-}" ] || limit=1800  # CPUs that may be busy
    [[ " $PARTS " == *" $name "* ]] || return 0
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
    local status=$?
    cat "$OUT/$name.log"
    echo "== $name ended with status $status after $((SECONDS - started)) s"
    return "$status"
}

failed=0
shape=(--hidden_size 4096 --layers 4 --batch_size 8)
# 512 steps are the 2^20 tokens of the computed run.
runs=(--steps 512 --repetitions 1)
nll=(--seeds 0,1,2 --steps 120 --jobs 6)
speed=(--device cuda --dtype bfloat16 --hidden_size 4096 --decode_hidden_size 8192 --repetitions 7)
merge=(--device cuda --shape 7b --parts merges --merges none,pca --repetitions 1)
if [ -n "${REHEARSE:-}" ]; then
    shape=(--hidden_size 128 --layers 2 --batch_size 2 --device cpu --dtype float32 --pairs 2)
    runs=(--steps 60 --repetitions 1)
    nll=(--seeds 0 --steps 10 --jobs 1 --held_out 12)
    speed=(--device cpu --dtype float32 --hidden_size 128 --decode_hidden_size 128 --repetitions 1 --contexts 32
        --batch_sizes 1 --decode_contexts 32 --decode_batch_sizes 1 --new_tokens 8 --max_seconds 1)
    merge=(--device cpu --shape tiny --parts merges --merges none,pca --repetitions 1)
fi
# Nothing is timed in the first two, so they share the card.
waiting=()
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ]; then
    OMP_NUM_THREADS=1 part 200 nll "$PYTHON" benchmarks/compaction_nll.py --model "$MODEL" --data "$DATA" \
        "${nll[@]}" --output "$OUT/compaction_nll.json" &
    waiting+=($!)
fi
OMP_NUM_THREADS=2 part 200 memory "$PYTHON" benchmarks/train_cost.py --parts memory "${shape[@]}" \
    --output "$OUT/train_cost.json" &
waiting+=($!)
for job in "${waiting[@]}"; do wait "$job" || failed=1; done

part 300 train "$PYTHON" benchmarks/train_cost.py --parts steps,runs,whole "${shape[@]}" "${runs[@]}" \
    --output "$OUT/train_cost.json" || failed=1
part 180 inference "$PYTHON" benchmarks/inference_speed.py "${speed[@]}" --output "$OUT/inference_speed.json" || failed=1
part 300 merge "$PYTHON" benchmarks/merge_cost.py "${merge[@]}" ${SCRATCH:+--scratch "$SCRATCH"} \
    --output "$OUT/merge_cost.json" || failed=1
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ]; then
    # Trainings of a small model leave most of the card idle, so several share it; without the service they take turns.
    if [[ " $PARTS " == *" compare "* ]] && command -v nvidia-cuda-mps-control > /dev/null && [ -z "${REHEARSE:-}" ]; then
        nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control' EXIT
    fi
    asked=(--tasks none)
    [ -z "${TASKS:-}" ] || asked=(--data_dir "$TASKS")
    # shellcheck disable=SC2086  # several flags
    part 590 compare "$PYTHON" -m compare --config benchmarks/compare/configs/gpu.yaml --models "$MODEL" --data "$DATA" \
        --output_dir "$OUT/compare" "${asked[@]}" ${COMPARE:-} || failed=1
fi
ls -l "$OUT"
exit $failed
