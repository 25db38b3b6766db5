# Common part of train_cc3m.sh, train_cc12m.sh and train_yfcc15m.sh, which source it after setting
# DATASET (name), DEFAULT_EPOCHS and FETCH (how to get the shards).
# Settings: Zhao et al., ICCV 2025 (arXiv 2507.12998).
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<EOF
Train CLIP on $DATASET with online sample selection: bash $(basename "$0") [FLAGS OF src/main.py]

Set by environment variables, here with their defaults:
  DATA=data/$DATASET/*.tar
                                        training shards: path, brace or glob pattern or URL; :: joins several
  VAL_DATA=                             validation shards for retrieval after every epoch; none without
  GPUS=all visible                      processes, one for each GPU
  STRATEGY=warmup_base_sampling         how samples are ranked; none trains on every sample
  RATE=0.2                              share of every batch that is trained on
  WARMUP_POINT=10                       epochs before warmup_base_sampling, learnability and jest select; with
                                        clean_posterior 5
  BATCH_SIZE=1280                       pairs per GPU and step, before selection
  EPOCHS=$DEFAULT_EPOCHS
  MODEL=RN50
  WORKERS=8                             loader processes per GPU
  NAME=                                 name of the run; by time and settings without
  OUTPUT_DIR=logs                       folder of the run folders
  TORCHRUN_ARGS=--standalone            how torchrun meets other nodes (see scripts/slurm)

Flags given to this script go to src/main.py last, and so win: bash $(basename "$0") --lr 1e-3 --warmup 2000
All of them: python src/main.py --help
EOF
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Number of GPUs this shell may use; 1 where there is none (src/main.py then trains on the CPU).
visible_gpus() {
    local count=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        count=$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES")
    elif command -v nvidia-smi >/dev/null; then
        count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    echo $((count > 0 ? count : 1))
}

# The first shard of a pattern: the first word of every brace, then the first match of a glob.
first_shard() {
    local pattern=$1 shorter first='s/\{([^{},]*),[^{}]*\}/\1/; t; s/\{([^{},.]*)\.\.[^{}]*\}/\1/'
    while shorter=$(sed -E "$first" <<<"$pattern") && [[ "$shorter" != "$pattern" ]]; do
        pattern=$shorter
    done
    compgen -G "$pattern" | head -n 1 || true
}

# Stop before anything is started where a source on this machine has no shard. URLs are left to webdataset.
check_shards() {
    local variable=$1 flag=$2 source
    while IFS= read -r source; do
        [[ "$source" == *://* || "$source" == pipe:* ]] && continue
        [[ -n "$(first_shard "$source")" ]] || fail "no $DATASET shards at $source (searched from $PWD, for $flag).
Set $variable to where they are, for example
  $variable='/data/$DATASET/{00000..00099}.tar' bash $(basename "$0")
$FETCH"
    done <<<"${!variable//::/$'\n'}"
}

for word in "$@"; do
    if [[ "$word" == -h || "$word" == --help ]]; then
        usage
        exit 0
    fi
done

DATA=${DATA:-data/$DATASET/*.tar}
VAL_DATA=${VAL_DATA:-}
GPUS=${GPUS:-$(visible_gpus)}
STRATEGY=${STRATEGY:-warmup_base_sampling}
RATE=${RATE:-0.2}
BATCH_SIZE=${BATCH_SIZE:-1280}
EPOCHS=${EPOCHS:-$DEFAULT_EPOCHS}
MODEL=${MODEL:-RN50}
WORKERS=${WORKERS:-8}
NAME=${NAME:-}
OUTPUT_DIR=${OUTPUT_DIR:-logs}
TORCHRUN_ARGS=${TORCHRUN_ARGS:---standalone}

check_shards DATA --train-data
command -v torchrun >/dev/null || fail "torchrun is not on the PATH: activate the environment that has torch in it"

flags=(
    --output-dir "$OUTPUT_DIR"
    --train-data "$DATA"
    --model "$MODEL"
    --batch-size "$BATCH_SIZE"
    --epochs "$EPOCHS"
    --workers "$WORKERS"
    --lr 2e-3
    --warmup 10000
    --wd 0.1
    --precision amp
    --seed 0
)
if [[ -n "$NAME" ]]; then
    flags+=(--name "$NAME")
fi
if [[ -n "$VAL_DATA" ]]; then
    check_shards VAL_DATA --val-data
    flags+=(--val-data "$VAL_DATA")
fi
if [[ "$STRATEGY" != none ]]; then
    flags+=(--select --select-strategy "$STRATEGY" --select-rate "$RATE")
fi
if [[ "$STRATEGY" =~ warmup_base_sampling|learnability|jest ]]; then
    flags+=(--warmup-point "${WARMUP_POINT:-10}")
elif [[ "$STRATEGY" == clean_posterior ]]; then
    flags+=(--warmup-point "${WARMUP_POINT:-5}")
fi

echo "$DATASET: $GPUS processes x batch $BATCH_SIZE (published: 8 x 1280), $EPOCHS epochs, strategy $STRATEGY"
# shellcheck disable=SC2086  # several words on purpose
exec torchrun $TORCHRUN_ARGS --nproc_per_node="$GPUS" "$ROOT/src/main.py" "${flags[@]}" "$@"
