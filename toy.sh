#!/usr/bin/env bash
# All stages in order: videos, reconstructor, labels, NTP, GRPO, evaluation. About 15 minutes on 2 CPU cores.
#
#   bash toy.sh                                          # generated clips, results in out/toy
#   SEED=2 OUT=out/toy_2 bash toy.sh                     # another seed
#   VIDEOS=my/videos OUT=out/mine bash toy.sh            # windows cut from your own videos, at least three
#   CONFIGS=config/my OUT=out/my bash toy.sh             # settings from config/my_videomae.py, config/my_label.py, …
#
# A stage is skipped if it is done and its result is still there, so an interrupted run goes on. To repeat a stage,
# delete its result; all later stages then run again too. Seconds per stage are in $OUT/seconds.txt.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
SEED=${SEED:-666}                       # of every stage
VIDEOS=${VIDEOS:-}                      # folder of long videos; empty: generate clips
OUT=${OUT:-out/toy}                     # results; the clips go to $OUT/data
CONFIGS=${CONFIGS:-config/toy}          # ${CONFIGS}_videomae.py and so on hold the settings of the stages
PROCESSES=${PROCESSES:-2}               # one core each
DEVICE=${DEVICE:-cpu}                   # the toy models are too small for a GPU; cuda takes one per process
CUT=${CUT:---stride=3 --hop=3}          # how windows are cut from VIDEOS
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONWARNINGS=ignore::UserWarning:torch

# Few videos are soon learned by heart: random crops, fewer steps.
few=() ntp_steps=() grpo_steps=()
if [ -n "$VIDEOS" ]; then
    few=(--crop=random --cache=false --n_workers=1) ntp_steps=(--steps=1000) grpo_steps=(--steps=800)
fi

# ---- stages

mkdir -p "$OUT"
settings="SEED=$SEED VIDEOS=$VIDEOS CONFIGS=$CONFIGS"
[ -e "$OUT/settings.txt" ] || echo "$settings" > "$OUT/settings.txt"
if [ "$(cat "$OUT/settings.txt")" != "$settings" ]; then
    echo "error: $OUT holds a run with $(cat "$OUT/settings.txt"): give another OUT, or delete it" >&2
    exit 2
fi
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
repeat=

todo() {  # todo STAGE RESULT: whether the stage has to run
    if [ -z "$repeat" ] && [ -e "$OUT/$2" ] && grep -qs "^$1 " "$OUT/seconds.txt"; then
        echo "== $1: done before"
        return 1
    fi
    echo "== $1"
    repeat=yes
    SECONDS=0
}

finished() {  # finished STAGE
    echo "$1 $SECONDS" >> "$OUT/seconds.txt"
}

run() {  # run PROCESSES SCRIPT ARGUMENTS…: show the command and run it
    local command=("$PYTHON" -u "${@:2}")
    if [ "$1" -gt 1 ]; then
        command=("$PYTHON" -m torch.distributed.run --standalone "--nproc_per_node=$1" "${@:2}")
    fi
    echo "\$ ${command[*]}"
    "${command[@]}"
}

common=("--root=$OUT/data" "--seed=$SEED" "--device=$DEVICE")
mae=("--videomae=$OUT/videomae")

if todo data data/val; then
    if [ -n "$VIDEOS" ]; then
        run 1 make_data.py cut "--src=$VIDEOS" "--out=$OUT/data" "--seed=$SEED" $CUT
    else
        run 1 make_data.py toy "${CONFIGS}_data.py" "--out=$OUT/data" "--seed=$SEED" "--n_workers=$PROCESSES"
    fi
    finished data
fi

if todo videomae videomae/model.safetensors; then
    run "$PROCESSES" train_videomae.py "${CONFIGS}_videomae.py" "${common[@]}" "--out_dir=$OUT/videomae" \
        ${few[@]+"${few[@]}"}
    rm -f "$OUT"/gazing_labels.json*    # of the reconstructor before
    finished videomae
fi

if todo labels gazing_labels.json; then
    run "$PROCESSES" label.py "${CONFIGS}_label.py" "${common[@]}" "${mae[@]}" "--out=$OUT/gazing_labels.json"
    finished labels
fi

grpo=(train_grpo.py "${CONFIGS}_grpo.py" "${common[@]}" "${mae[@]}" ${few[@]+"${few[@]}"}
      ${grpo_steps[@]+"${grpo_steps[@]}"})

# GRPO from scratch, to see what NTP is worth, runs beside NTP: two processes of one core do more than one of two.
if todo ntp ntp/model.safetensors; then
    run 1 "${grpo[@]}" --init_from=scratch "--out_dir=$OUT/rl_only" > "$OUT/rl_only.log" 2>&1 &
    run $((PROCESSES > 2 ? PROCESSES - 1 : 1)) train_ntp.py "${CONFIGS}_ntp.py" "${common[@]}" "${mae[@]}" \
        "--labels=$OUT/gazing_labels.json" "--out_dir=$OUT/ntp" ${ntp_steps[@]+"${ntp_steps[@]}"}
    wait $! || { tail -5 "$OUT/rl_only.log"; exit 1; }
    finished ntp
fi

if todo grpo grpo/model.safetensors; then
    run "$PROCESSES" "${grpo[@]}" "--init_from=$OUT/ntp" "--out_dir=$OUT/grpo"
    finished grpo
fi

if todo eval report.json; then
    run 1 eval.py "${CONFIGS}_eval.py" "${common[@]}" "${mae[@]}" "--out_dir=$OUT/eval" "--report=$OUT/report.json" \
        "--models=rl_only=$OUT/rl_only,ntp=$OUT/ntp,grpo=$OUT/grpo"
    finished eval
fi

echo "pictures:"
ls "$OUT"/*/*.png
