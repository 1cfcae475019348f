"""Training data from people's own videos. Start at source.py: `open_source(config)` and its `batch`.

config.py    what a source is, as dataclasses
index.py     folders and tar shards -> clips with captions and sizes, without unpacking
decode.py    one window of one clip: target fps, cropped and resized to a bucket
buckets.py   the bucket that a clip goes to
order.py     which clips make up a batch: a function of (seed, step, microbatch) alone
broken.py    broken clips: named, counted, skipped, and too many refused
source.py    batches of video
prompts.py   batches of prompts
latents.py   a source encoded to disk once, and batches of its latents
command.py   `streamgen latents`
"""
