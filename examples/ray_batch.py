"""Many recordings on a Ray cluster, here on one machine; pip install 'arkasr[ray]'. Usage: ray_batch.py FILE..."""

import sys
from pathlib import Path

import ray

from arkasr.jobs import BatchTranscriber

WORKERS = 1  # each has a model of its own

ray.init(log_to_driver=False)
ray.data.DataContext.get_current().execution_options.preserve_order = True
recordings = ray.data.from_items([{"audio": str(Path(name).resolve())} for name in sys.argv[1:]])
transcribed = recordings.map_batches(BatchTranscriber, batch_size=64, compute=ray.data.ActorPoolStrategy(size=WORKERS))
for row in transcribed.iter_rows():
    print(row["error"] or row["text"])
