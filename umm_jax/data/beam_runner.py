"""Shards written by an Apache Beam pipeline, on this machine or on Dataflow, Flink or Spark.

For :func:`making.make_records`: one element of the pipeline is one shard, and a shard is the same bytes
whoever writes it. Workers find `umm_jax`, the material and the output folder under the paths they have here:
on other machines that is a mounted bucket or a shared disk.
"""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from umm_jax import errors
from umm_jax.data.making import Job, Make, files_of, write_shard
from umm_jax.errors import ConfigError, UserError

# Beam's own local runner: Prism, which DirectRunner prefers, is a program that it would have to download.
LOCAL = "--runner=FnApiRunner"


class BeamRunner:
    """Writes shards with a pipeline.

    Args:
        options: Beam's own, such as ``--runner=FlinkRunner``; LOCAL where they name no runner.

    Raises:
        ConfigError: Beam is not installed here.
    """

    def __init__(self, options: Sequence[str] = ()):
        try:
            import apache_beam  # noqa: F401
        except ImportError:
            raise ConfigError(
                "Apache Beam is not installed here; best give it an environment of its own: "
                "python -m venv .beam && .beam/bin/pip install 'umm_jax[beam]'"
            ) from None
        named = any(option.partition("=")[0] == "--runner" for option in options)
        self.options = list(options) if named else [LOCAL, *options]

    def __call__(self, make: Make, jobs: Sequence[Job]) -> None:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        jobs = [(str(Path(path).resolve()), *rest) for path, *rest in jobs]
        for path, *_ in jobs:
            _failure(path).unlink(missing_ok=True)
        try:
            with beam.Pipeline(options=PipelineOptions(self.options)) as pipeline:
                shards = pipeline | "shards" >> beam.Create(jobs)
                # Beam would hand all that one Create gave to one worker.
                shards = shards | "spread" >> beam.Reshuffle()
                shards | "write" >> beam.Map(_write, make)
        except Exception:
            # Beam tells of an error by its text alone. What a worker left says which it was.
            for path, *_ in jobs:
                if _failure(path).exists():
                    kind, said = json.loads(_failure(path).read_text())
                    _failure(path).unlink()
                    raise getattr(errors, kind)(said) from None
            raise


def _failure(path: str) -> Path:
    return Path(path + ".failed")


def _write(job: Job, make: Make) -> None:
    """Writes a shard in a folder of its own: a runner may well do the same work twice, and side by side."""
    path, *rest = job
    apart = Path(f"{path}.{uuid.uuid4().hex}.part")
    apart.mkdir()
    try:
        own = apart / Path(path).name
        write_shard(make, (str(own), *rest), lambda records: None)
        for made, final in zip(files_of(own), files_of(Path(path))):
            if made.exists():
                os.replace(made, final)
    except UserError as error:
        _failure(path).write_text(json.dumps([type(error).__name__, str(error)]))
        raise
    finally:
        shutil.rmtree(apart, ignore_errors=True)
