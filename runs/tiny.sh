#!/usr/bin/env bash
# Makes the shipped model from nothing: runs/tiny.sh SPEECH_FOLDER [WORK_FOLDER]
# SPEECH_FOLDER holds an4/ with its manifest.jsonl. Two CPU cores and 4 GB of memory; about three hours on a quiet machine.
# Every step resumes or is skipped when it is complete: run it again after an interruption.
set -euo pipefail
speech=$(realpath "$1")
work=$(realpath -m "${2:-work/tiny}")
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train]"
PATH="$PWD/.venv/bin:$PATH"
{ command -v espeak-ng && command -v flite; } > /dev/null || { apt-get update -qq && apt-get install -y -qq espeak-ng flite; }
export OPENBLAS_NUM_THREADS=1 # one batch worker beside two training threads

[ -e "$work/start/tokenizer.json" ] || python runs/tiny_data.py "$speech" "$work"

# 1. Learn to hear: CTC alone, short clean clips, until it is well off its plateau.
ark-asr train sft --model "$work/start" --out "$work/hear" --eval "$work/an4_test.jsonl" \
  --train "$work/synthetic.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --steps 1500 --lr 1.2e-3 --warmup-steps 300 --ctc-only-steps 1500 --average 0.99 --batch-s 24 \
  --max-duration-s 2.5 --gain-db 6

# 2. Cut the training clips into words with what it hears, and join them anew.
[ -e "$work/hear/spliced.jsonl" ] || python runs/tiny_splice.py "$work/an4.jsonl" "$work/hear/model" "$work/hear"

# 3. Learn to write: the decoder joins in after 600 updates, on everything, augmented.
ark-asr train sft --model "$work/hear/model" --out "$work/write" --eval "$work/an4_test.jsonl" \
  --train "$work/synthetic.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/hear/spliced.jsonl" --train "$work/hear/words.jsonl" \
  --steps 5000 --lr 1e-3 --warmup-steps 200 --ctc-only-steps 600 --ctc-weight 0.5 --average 0.999 --batch-s 24 \
  --max-duration-s 12 --bf16 --speed 0.1 --gain-db 8 --noise 0.4 --narrow 0.25 --pad-s 0.3 --frequency-masks 2

# 4. A decoder of twice the layers keeps its place better; words cut by the better ear, and tightly cut short clips.
[ -e "$work/grown/ctc_head.safetensors" ] || python runs/tiny_grow.py "$work/write/model" "$work/grown"
[ -e "$work/grown/spliced.jsonl" ] || python runs/tiny_splice.py "$work/an4.jsonl" "$work/write/model" "$work/grown"
head -n 4500 "$work/synthetic.jsonl" > "$work/synthetic_half.jsonl"
ark-asr train sft --model "$work/grown" --out "$work/polish" --eval "$work/an4_test.jsonl" \
  --train "$work/synthetic_half.jsonl" --train "$work/short.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/grown/spliced.jsonl" --train "$work/grown/words.jsonl" --train "$work/grown/words.jsonl" \
  --steps 3000 --lr 8e-4 --warmup-steps 150 --ctc-weight 0.4 --average 0.999 --batch-s 24 \
  --max-duration-s 12 --bf16 --speed 0.12 --gain-db 14 --noise 0.4 --narrow 0.4 --pad-s 0.3 --frequency-masks 1

# 5. The same at a falling rate, with weak edges cut off and what hisses weakened, as cheap recordings of single words have it.
ark-asr train sft --model "$work/polish/model" --out "$work/final" --eval "$work/an4_test.jsonl" \
  --train "$work/synthetic_half.jsonl" --train "$work/short.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" --train "$work/an4.jsonl" \
  --train "$work/grown/spliced.jsonl" --train "$work/grown/words.jsonl" --train "$work/grown/words.jsonl" \
  --train "$work/grown/words.jsonl" \
  --steps 4500 --lr 5.5e-4 --warmup-steps 100 --ctc-weight 0.4 --average 0.999 --batch-s 24 \
  --max-duration-s 12 --bf16 --speed 0.12 --gain-db 14 --noise 0.3 --narrow 0.4 --tilt 0.6 --trim 0.4 --pad-s 0.3

# 6. Ship it in bfloat16, and measure.
python runs/tiny_ship.py "$work/final/model"
python bench/tiny.py "$speech"
