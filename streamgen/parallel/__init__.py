"""Several processes: who is here, what they tell each other, and how a module is spread over them.

processes.py   join the processes that torchrun started; agree, gather, fail together
tensors.py     tensors in shards beside ordinary ones
fsdp.py        a module in shards (FSDP2), with a table of what is sharded and which methods need whole weights
"""
