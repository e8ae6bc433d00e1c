#!/usr/bin/env bash
# What teacher data and on-policy distillation bring, on real speech: runs/opd-proof.sh SPEECH_FOLDER [WORK_FOLDER]
# SPEECH_FOLDER holds an4/ and fsdd/ with their manifest.jsonl. Two CPU cores and 6 GB of memory; about three hours.
# Every step resumes or is skipped when it is complete: run it again after an interruption.
set -euo pipefail
speech=$(realpath -s "$1")
work=$(realpath -m "${2:-work/opd}")
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval,train]"
PATH="$PWD/.venv/bin:$PATH"
{ command -v espeak-ng && command -v flite; } > /dev/null || { apt-get update -qq && apt-get install -y -qq espeak-ng flite; }
export OPENBLAS_NUM_THREADS=1 # one batch worker beside the training threads

# 1. A teacher four times the student's size: grown out of `tiny`, on AN4, its words joined anew, and synthetic speech.
[ -e "$work/start/tokenizer.json" ] || python runs/tiny_data.py "$speech" "$work"
head -n 4500 "$work/synthetic.jsonl" > "$work/synthetic_half.jsonl"
[ -e "$work/teacher_start/tokenizer.json" ] || python runs/opd_models.py teacher "$work/teacher_start"
ark-asr train sft --model "$work/teacher_start" --out "$work/teacher_hear" --eval "$work/an4_test.jsonl" \
  --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/synthetic_half.jsonl" \
  --steps 500 --lr 5e-4 --warmup-steps 100 --ctc-weight 0.5 --average 0.99 --batch-s 24 --eval-every 250 \
  --max-duration-s 12 --bf16 --speed 0.1 --gain-db 8 --noise 0.4 --narrow 0.25 --pad-s 0.3
[ -e "$work/spliced/spliced.jsonl" ] || python runs/tiny_splice.py "$work/an4.jsonl" "$work/teacher_hear/model" "$work/spliced"
ark-asr train sft --model "$work/teacher_hear/model" --out "$work/teacher" --eval "$work/an4_test.jsonl" \
  --train "$work/synthetic_half.jsonl" --train "$work/short.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/spliced/spliced.jsonl" --train "$work/spliced/words.jsonl" --train "$work/spliced/words.jsonl" \
  --steps 2400 --lr 8e-4 --warmup-steps 150 --ctc-weight 0.4 --average 0.999 --batch-s 32 --eval-every 400 \
  --max-duration-s 12 --bf16 --speed 0.12 --gain-db 12 --noise 0.3 --narrow 0.3 --tilt 0.4 --trim 0.3 --pad-s 0.3

# 2. What the teacher writes of AN4's training clips.
ark-asr train teacher-data --teacher "$work/teacher/model" --dtype float32 --train "$work/an4.jsonl" --out "$work/teacher_data.jsonl"

# 3. The student's base, half of `tiny`, and its arms: as many updates each, on the same clips, augmented alike.
python runs/opd_models.py student "$work/student_start"
for seed in 1 2 3; do
  ark-asr train sft --model "$work/student_start" --out "$work/seed$seed/base" --eval "$work/an4_test.jsonl" \
    --train "$work/an4.jsonl" --seed $seed --threads 2 --steps 1500 --lr 8e-4 --warmup-steps 100 --ctc-weight 0.3 \
    --average 0.995 --batch-s 24 --eval-every 500 --max-duration-s 12 \
    --speed 0.1 --gain-db 8 --noise 0.4 --narrow 0.25 --pad-s 0.3
  runs/opd-arms.sh "$work" "$work/seed$seed/base/model" "$work/seed$seed" $seed 4e-4
done

# 4. The same arms for a student of the size of `tiny`, which begins from it: is there a better one to ship?
runs/opd-arms.sh "$work" tiny "$work/tiny1" 1 2e-4

# 5. Word error rates on speakers whom nobody has heard, and what may be said of them.
for model in "$work"/teacher "$work"/{seed,tiny}?/*; do
  [ -e "$model/model/model.safetensors" ] || continue
  name=${model#"$work"/}
  ark-asr eval run "$speech/an4" "$speech/fsdd" --model "$model/model" --dtype float32 --normalizer plain \
    --output "$work/eval/${name//\//-}"
done
ark-asr eval run "$speech/an4" "$speech/fsdd" --model tiny --dtype float32 --normalizer plain --output "$work/eval/tiny"
python runs/opd_proof.py "$work"
