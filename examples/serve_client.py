"""A recording as text, as a stream, and as subtitles, by OpenAI's client from a server of one's own.

Usage: ark-asr serve --model tiny &  python examples/serve_client.py FILE [URL] [API_KEY]
"""

import sys
from pathlib import Path

import openai

recording = Path(sys.argv[1])
url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"
key = sys.argv[3] if len(sys.argv) > 3 else "unused without keys"

with openai.OpenAI(base_url=url, api_key=key) as client:
    model = client.models.list().data[0].id
    answer = client.audio.transcriptions.create(file=recording, model=model)
    print(answer.text)

    for event in client.audio.transcriptions.create(file=recording, model=model, stream=True):
        if event.type == "transcript.text.delta":
            print(event.delta, end="", flush=True)
    print()

    print(client.audio.transcriptions.create(file=recording, model=model, response_format="srt"), end="")

    detailed = client.audio.transcriptions.create(file=recording, model=model, response_format="verbose_json")
    for segment in detailed.segments or []:
        print(f"{segment.start:.2f}-{segment.end:.2f} s: {segment.text} ({segment.avg_logprob:.3f})")
