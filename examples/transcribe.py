"""Text of a recording, with how sure the model is of it. Usage: python examples/transcribe.py FILE."""

import sys

import arkasr

transcript = arkasr.load_model("tiny").transcribe(sys.argv[1])
print(f"{transcript.text}  ({transcript.duration_s:.1f} s, confidence {transcript.confidence:.2f})")
