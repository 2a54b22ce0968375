"""Reading the elements of a random-access dataset in order, here or in processes; what is counted of them."""

import grain
from absl import flags

# Conversations left out, conversations shortened, rows left out because they held no image.
COUNTS = ("dropped", "truncated", "imageless")


def read(elements: grain.MapDataset, start: int, workers: int) -> grain.DatasetIterator:
    """Elements from `start` on, in order, decoded here or by `workers` processes."""
    # No read-ahead threads: decoding holds the interpreter lock most of the time, and the prefetch thread
    # behind packing already keeps ahead of the device.
    dataset = elements[start:].to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        # Grain reads its debugging flags when it starts processes, and absl wants them parsed by then.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=64)
        dataset = dataset.mp_prefetch(options)
    return iter(dataset)
