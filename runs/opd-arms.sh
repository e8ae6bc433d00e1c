#!/usr/bin/env bash
# The arms of the proof for one student and seed: runs/opd-arms.sh WORK_FOLDER STUDENT TARGET SEED LR (see opd-proof.sh)
# All have as many updates, on the same clips, augmented alike.
set -euo pipefail
work=$1 student=$2 target=$3 seed=$4 lr=$5
common=(
  --model "$student" --eval "$work/an4_test.jsonl" --seed "$seed" --steps 600 --lr "$lr" --warmup-steps 30
  --average 0.99 --batch-s 24 --eval-every 300 --log-every 25 --max-duration-s 12 --threads "${THREADS:-2}"
  --speed 0.1 --gain-db 8 --noise 0.4 --narrow 0.25 --pad-s 0.3
)
ark-asr train sft "${common[@]}" --out "$target/sft" --train "$work/an4.jsonl" --ctc-weight 0
ark-asr train sft "${common[@]}" --out "$target/td" --train "$work/teacher_data.jsonl" --ctc-weight 0
ark-asr train opd "${common[@]}" --out "$target/opd1" --train "$work/an4.jsonl" --teacher "$work/teacher/model" --rollouts 1
ark-asr train opd "${common[@]}" --out "$target/opd4" --train "$work/an4.jsonl" --teacher "$work/teacher/model" --rollouts 4
ark-asr train opd "${common[@]}" --out "$target/td_opd4" --train "$work/an4.jsonl" --teacher "$work/teacher/model" \
  --rollouts 4 --cold-start "$work/teacher_data.jsonl" --cold-start-steps 300
