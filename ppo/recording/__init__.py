"""Computations of a policy, recorded once and repeated without torch's cost per call.

`tape` records and repeats, `kernels` says how single operations are repeated, and `fingerprint`
tells whether a policy still is what it was when it was recorded.
"""
