"""Recordings of a folder, or of parquet files, on a Ray cluster, or on this machine: pip install 'arkasr[ray]'."""

import argparse
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here would report itself

import ray
from ray.data import ActorPoolStrategy, Dataset, SaveMode

from arkasr.jobs import SUFFIXES, BatchTranscriber


def read(source: str, column: str | None) -> Dataset:
    """Rows with the bytes of a file each, and what says which it is."""
    if column:
        return ray.data.read_parquet(source)
    names = sorted(suffix.removeprefix(".") for suffix in SUFFIXES)
    return ray.data.read_binary_files(source, include_paths=True, file_extensions=names)


def main() -> None:
    """Write text, confidence and error of each recording to a new folder, in no order, as they are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="a folder of recordings, or of parquet files; s3:// and gs:// go, too")
    parser.add_argument("output", help="a folder that is not there yet")
    parser.add_argument("--column", help="the source is parquet, and this its column of files' bytes")
    parser.add_argument("--jsonl", action="store_true", help="write JSON lines, not parquet")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--engine", default="auto", help="vllm for GPUs that have it")
    parser.add_argument("--workers", type=int, default=1, help="each has a model of its own")
    parser.add_argument("--cpus", type=float, default=1, help="of a worker; leave one CPU for reading and writing")
    parser.add_argument("--gpus", type=float, default=0, help="of a worker: 0.25 lets four share a GPU")
    parser.add_argument("--batch-size", type=int, default=16, help="recordings a worker is given at once")
    given = parser.parse_args()

    ray.init(log_to_driver=False)
    column = given.column or "bytes"
    transcribed = (
        read(given.source, given.column)
        .map_batches(
            BatchTranscriber,
            fn_constructor_args=(given.model,),
            fn_constructor_kwargs={"column": column, "engine": given.engine},
            compute=ActorPoolStrategy(size=given.workers),
            batch_size=given.batch_size,
            num_cpus=given.cpus,
            num_gpus=given.gpus or None,
        )
        .drop_columns([column])
    )
    # Ray restarts a worker that dies, and gives it its batches again; what has been written has a name by its task.
    (transcribed.write_json if given.jsonl else transcribed.write_parquet)(given.output, mode=SaveMode.ERROR)


if __name__ == "__main__":
    main()
