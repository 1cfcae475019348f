"""The frame server's parts: sessions, queues, encoders, limits, metrics, and the commands `serve` and `load`.

Start with `streamgen_infer/server.py`; the wire is `streamgen_infer/protocol.py` and docs/protocol.md.
"""
