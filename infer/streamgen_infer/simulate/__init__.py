"""What `streamgen plan simulate` plays and says; the run itself is `streamgen_infer/simulator.py`."""
