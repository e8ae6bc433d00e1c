#!/usr/bin/env bash
# Measures the shipped model and writes docs/evaluation/: runs/evaluation.sh SPEECH_FOLDER [WORK_FOLDER]
# SPEECH_FOLDER holds an4/, fsdd/, esc10/ and music_nature/ with their manifest.jsonl. Two CPU cores, about ten minutes.
# Every run resumes: start it again after an interruption. Delete WORK_FOLDER to measure anew.
set -euo pipefail
speech=$(realpath -s "$1")
work=$(realpath -m "${2:-work/evaluation}")
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval,train]"
PATH="$PWD/.venv/bin:$PATH"

# 1. The sets of its domain, and clips in which nobody speaks.
ark-asr eval run "$speech/an4" "$speech/fsdd" --model tiny --output "$work/tiny"
ark-asr eval run "$speech/esc10" "$speech/music_nature" nonspeech --model tiny --keep-empty --warmup 0 --output "$work/tiny"

# 2. AN4 made harder: noise, rooms, telephones, codecs ..., and three ladders of noise.
ark-asr eval robust "$speech/an4" --model tiny --suite standard --output "$work/tiny"
ark-asr eval robust "$speech/an4" --model tiny --suite noise --output "$work/tiny"

# 3. Speed against batch size.
for size in 1 4 64; do
  ark-asr eval run "$speech/an4" --model tiny --batch-size "$size" --output "$work/tiny-batch-$size"
done

# 4. A checkpoint that is known to be worse, and the comparison.
[ -e "$work/worse/config.json" ] || python runs/worse.py tiny "$work/worse" --noise 0.2
ark-asr eval run "$speech/an4" "$speech/fsdd" --model "$work/worse" --output "$work/tiny-worse"

# 5. The reports.
rm -rf docs/evaluation
speeds=()
for size in 1 4 64; do speeds+=(--speed "$work/tiny-batch-$size"); done
ark-asr eval report "$work/tiny" --title "tiny" --output docs/evaluation/tiny "${speeds[@]}"
ark-asr eval report "$work/tiny" "$work/tiny-worse" --title "tiny against a worse tiny" --output docs/evaluation/tiny-worse
mkdir -p docs/evaluation/manifests
cp "$work/tiny"/{run.json,*an4__test.jsonl,*fsdd__test.jsonl} docs/evaluation/manifests/
