"""`streamgen bench`: how long a block takes, and how near that is to the machine's limit.

app.py, command.py    the command; suites of blocks
cases.py              what is timed block by block: the shipped model, `mid`, Wan 1.3B on a small picture
measure.py            the times of a case, beside its bound in the same run
bound.py, stages.py   the bare products of the same shapes; arithmetic, bytes and roofs of every stage
compare.py, show.py   what got worse between two files; tables and pictures
suites.py             suites that do not time blocks: kernels, wan_14b.py, train.py, server.py
live.py               the engine, viewers.py in real time, pipeline.py over two ranks
cuda*.py              Wan 1.3B at its true size on a GPU
"""
