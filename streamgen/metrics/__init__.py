"""Figures of merit of generated video: pure functions from frames to numbers.

adherence.py        what the checker says of clips, streams and switches, and what chance would say
intervals.py        how far such shares can be trusted
motion.py           speed, share of moving clips and jerk, from tracks
stream.py           STREAM-T, STREAM-F and STREAM-D: generated against real clips, in time and in space
reconstruction.py   what the codec alone loses
quick.py            adherence of a model as it trains, in one call
"""
