"""Codecs that others trained, behind `streamgen.codec.StreamingCodec`: `wan.py` for Wan's own, `taehv.py` for previews.

Both follow Wan's rule of time: the first latent frame is one frame of video, every later one is four.
"""
