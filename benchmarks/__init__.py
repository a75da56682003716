"""Speed, memory and accuracy beside upstream's own code: `python -m benchmarks.attention`, `.model`; `.conversion`
beside the disk's own speed.

Run from a checkout of the repository; `benchmarks/README.md` says how to read the results. Nothing here is a test.
"""
