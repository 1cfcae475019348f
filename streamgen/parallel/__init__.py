"""Several processes: who is here, what they tell each other, and how a module or a stream is spread over them.

processes.py   join the processes that torchrun started; agree, gather, fail together
tensors.py     tensors in shards beside ordinary ones
fsdp.py        a module in shards (FSDP2), with a table of what is sharded and which methods need whole weights

One stream over several processes, under same-level visibility:

levels.py      a cache for each step; the function that runs one cell, whatever the order and the place
job.py         what every rank knows; the order of a block; who runs which steps
chain.py       steps over ranks, latents between them
ring.py        layers over ranks, activations between them; balance.py moves layers by measured times
transport.py   messages from rank to rank; host.py is what a rank is told and tells
replay.py      caches made again from latents, to the bit
worker.py      the process of a rank, of torchrun's or of the supervisor's
supervise.py   starts and watches ranks, and goes on when one dies; piped.py is what it gives out and keeps in mind
measure.py     how fast that is
"""
