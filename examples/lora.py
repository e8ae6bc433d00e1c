"""LoRA with PEFT: teaches `tiny` to write small letters, from two clips. Usage: python examples/lora.py FOLDER.

The adapter is merged, and FOLDER is a checkpoint like any other: `ark-asr transcribe --model FOLDER FILE`.
Needs `pip install 'arkasr[hf]' peft`.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor

import arkasr.hf  # registers the model

CLIPS = Path(__file__).parent / "audio"
TARGETS = {"an4-rubout.flac": "rubout g m e f three nine", "an4-patterson.flac": "p a t t e r s o n"}
STEPS, LEARNING_RATE = 50, 5e-3

folder = Path(sys.argv[1])
base = arkasr.pins.SHIPPED / "tiny"
processor = AutoProcessor.from_pretrained(base)
torch.manual_seed(0)
# The decoder's attention and feed-forward layers; the audio encoder stays as it is.
adapter = LoraConfig(r=8, lora_alpha=16, target_modules=r"model\.layers\..*\.(q|k|v|o|gate|up|down)_proj")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
model.print_trainable_parameters()

batch = processor.apply_transcription_request([CLIPS / name for name in TARGETS], targets=list(TARGETS.values()))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
for step in range(1, STEPS + 1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 1:
        print(f"step {step}: loss {loss.item():.3f}")

model.merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
processor.save_pretrained(folder)
for transcript in arkasr.load_model(folder, engine="pytorch").transcribe(CLIPS / name for name in TARGETS):
    print(transcript.text)
